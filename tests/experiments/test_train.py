"""train.py: batches that depend on the step alone, stages with gates, adapters that eval.py takes."""

import json
from pathlib import Path

import pytest

from experiments.data.module import Batches, Steps, collate
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.fit import check_gate
from tests.experiments.conftest import finish, start

SMALL = ["model=tiny_scratch", "model.config.vision.hidden_size=16", "model.config.lm.d_model=16", "threads=1"]


def glyphs(n: int = 24, per_picture: int = 3) -> SynthGlyphs:
    return SynthGlyphs(split="train", n=n, density="train", qa_per_image=per_picture)


def test_a_batch_depends_on_its_step_alone() -> None:
    first, second = Batches(glyphs(), 6, seed=1), Batches(glyphs(), 6, seed=1)
    for step in (5, 0, 3):
        first.indices(step)
    assert [first.indices(s) for s in range(9)] == [second.indices(s) for s in range(9)]
    assert [Batches(glyphs(), 6, seed=2).indices(s) for s in range(9)] != [second.indices(s) for s in range(9)]


def test_every_epoch_holds_every_sample_once_in_a_new_order() -> None:
    batches = Batches(glyphs(24), 6, seed=0)
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in batches.indices(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_questions_of_a_picture_stay_together_and_share_its_object() -> None:
    batches = Batches(glyphs(24), 6, seed=0)
    for step in range(4):
        assert [i // 3 for i in batches.indices(step)[::3]] == [i // 3 for i in batches.indices(step)[2::3]]
    batch = batches(0)
    assert len({id(image) for image in batch.images}) == 2
    assert len(set(batch.ids)) == 6


def test_a_last_picture_with_fewer_questions_does_not_break_an_epoch() -> None:
    batches = Batches(glyphs(10), 5, seed=0)
    seen = {i for step in range(3) for i in batches.indices(step)}
    assert seen == set(range(10))


def test_a_resumed_loader_goes_on_with_its_own_step() -> None:
    batches = Batches(glyphs(), 3, seed=0)
    whole = [batch.ids for batch in Steps(batches, 0, 6)]
    assert [batch.ids for batch in Steps(batches, 4, 6)] == whole[4:]


def test_collate_takes_the_first_answer_and_the_prompt_with_its_suffix() -> None:
    dataset = SynthGlyphs(split="train", n=3, density="train", qa_per_image=3, suffix=" now")
    batch = collate([dataset[i] for i in range(3)])
    assert batch.prompts == [f"{question} now" for question in batch.questions]
    assert list(batch.answers) == [dataset[i].answers[0] for i in range(3)]


def test_a_gate_names_what_fell_short() -> None:
    check_gate({"fine": 0.4}, {"fine": 0.35})
    with pytest.raises(ValueError, match="fine is 0.300, it must be at least 0.35"):
        check_gate({"fine": 0.3, "guard": 1.0}, {"fine": 0.35})
    with pytest.raises(ValueError, match="gate.letters: this stage measures fine"):
        check_gate({"fine": 0.3}, {"letters": 0.35})


def test_an_adapter_is_trained_named_and_evaluated(tmp_path: Path) -> None:
    weights = tmp_path / "base"
    scratch = [*SMALL, f"weights={weights}", "stage=align", "optim.steps=2", "optim.warmup=0", "gate.explained=-100"]
    code, out, err = finish(start("train", *scratch, "study=s", cwd=tmp_path))
    assert (code, err) == (0, []), err
    (stage,) = json.loads((weights / "training.json").read_text())["stages"]
    assert stage["stage"] == "align" and stage["seed"] == 0 and "explained" in stage["gate"]

    adapt = [f"model.path={weights}", "selector=shirg", "lora.rank=64", "optim.steps=2", "optim.warmup=0", "threads=1"]
    code, out, err = finish(start("train", *adapt, "study=s", cwd=tmp_path))
    assert (code, err) == (0, []), err
    (command,) = [
        line.removeprefix("evaluate ").split()
        for line in out.splitlines()
        if line.startswith("evaluate python eval.py")
    ]
    assert command[:2] == ["python", "eval.py"]
    code, out, err = finish(start("eval", *command[2:], "study=s", "data.n=12", "threads=1", cwd=tmp_path))
    assert (code, err) == (0, []), err
    assert "shirg" in out


def test_a_wrong_lora_target_lists_the_nearest_names(tmp_path: Path) -> None:
    command = [*SMALL, "lora.targets=[mm_projector.fc1]", "optim.steps=1", "optim.warmup=0"]
    code, _, err = finish(start("train", *command, cwd=tmp_path))
    assert code == 1
    assert len(err) == 1 and "mm_projector.fc1" in err[0] and "mm_projector.0" in err[0]


def test_a_failed_gate_writes_no_weights(tmp_path: Path) -> None:
    weights = tmp_path / "w"
    command = [*SMALL, f"weights={weights}", "stage=align", "optim.steps=1", "optim.warmup=0", "gate.explained=1"]
    code, _, err = finish(start("train", *command, cwd=tmp_path))
    assert code == 1 and len(err) == 1 and "did not pass its gate" in err[0]
    assert not weights.exists()
