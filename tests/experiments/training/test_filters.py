"""Training on conversations, folders and mixtures: examples without room for an answer are dropped and counted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from baselines import Saint
from experiments.data.folder import Folder
from experiments.data.llava import Llava
from experiments.training.filters import drop_too_long, first_that_fit
from experiments.training.stages import answered, draw_examples
from lavida_adapter import Lavida, ObjectiveConfig
from lavida_adapter.lightning_module import LavidaModule, OptimConfig
from lavida_adapter.prompt import prompt_ids
from tests.data import official
from tests.experiments.conftest import Here, result_of

LONG = "why " * 1500
"""More than the 4096 positions of the model's context, in a tokenizer of bytes."""


def llava(folder: Path, questions: list[str]) -> list[str]:
    """Writes a dataset; returns the overrides that train on it."""
    folder.mkdir()
    (folder / "images").mkdir()
    entries: list[dict[str, Any]] = []
    for i, question in enumerate(questions):
        Image.effect_noise((60, 40), 60).convert("RGB").save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "it is"}]
        entries.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "talks.json").write_text(json.dumps(entries))
    return ["data=llava", f"data.json={folder / 'talks.json'}", f"data.images={folder / 'images'}"]


def stage_of(weights: Path) -> LavidaModule:
    model = Lavida.from_pretrained(weights)
    return LavidaModule(model, Saint(budget=80), None, ObjectiveConfig(), OptimConfig(lr=1e-3, steps=1), 0)


WORDS = ["selector=shirg", "optim.steps=2", "batch_size=2", "study=s", "objective.answer_tokens=null"]


def test_a_cut_answer_is_learned_and_a_lost_one_is_counted(
    train_here: Here, tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prompts around the last place that leaves room for one token of the answer, behind 80 tokens of the picture."""
    model = Lavida.from_pretrained(tiny_weights)
    template = len(prompt_ids(model.tokenizer, "w", model.config, training=True)) - 2
    room = model.config.tokenizer_model_max_length - 80 - template
    questions = ["w" * length for length in (4, room - 1, room, room + 100)]
    job = train_here(*WORDS, "optim.steps=1", *llava(tmp_path / "data", questions))
    printed = capfd.readouterr().out
    assert "talks train: 2 examples; dropped 2 whose prompt leaves no room for the answer" in printed
    (data,) = result_of(job)["data"].values()
    assert re.fullmatch("[0-9a-f]{16}", data.pop("content"))
    assert data == {
        "name": "talks",
        "split": "train",
        "n": 2,
        "dropped": {"whose prompt leaves no room for the answer": 2},
    }


def test_the_largest_of_the_budgets_that_train_in_turn_decides(
    train_here: Here, tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that fits the run's own budget alone would end the training at the step that draws the other."""
    model = Lavida.from_pretrained(tiny_weights)
    template = len(prompt_ids(model.tokenizer, "w", model.config, training=True)) - 2
    room = model.config.tokenizer_model_max_length - template
    data = llava(tmp_path / "data", ["w" * 4, "w" * (room - 100)])
    train_here(*WORDS, "optim.steps=4", "budget=40", "mix.budgets=[40,200]", *data)
    assert "talks train: 1 examples; dropped 1 whose prompt" in capfd.readouterr().out


def test_a_bfloat16_base_with_a_whole_trained_projector_is_filtered(train_here: Here, picture_folder: Any) -> None:
    """The projector is float32 then, and the tower is not."""
    words = ["recipe=full_projector", "dtype=bfloat16", "objective=tiny", "optim.steps=1", "batch_size=2"]
    job = train_here(*words, "data=folder", f"data.root={picture_folder('own', ['how many?'] * 2)}")
    assert result_of(job)["status"] == "ok"


def test_a_benchmark_s_long_prompts_are_dropped_before_they_stop_a_training(
    train_here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has all four examples; scores from a file, which know their pictures alone, change nothing."""
    monkeypatch.setattr(official, "question", lambda i: LONG if i == 2 else f"What is {i}?")
    read = official.write("docvqa", "disk", tmp_path / "pages", "train", 4)
    save_file({f"{100 + i}": torch.arange(320.0) for i in range(4)}, tmp_path / "scores.safetensors")
    external = ["relevance=external", f"relevance.path={tmp_path / 'scores.safetensors'}"]
    for words in ([], external):
        job = train_here(*WORDS, "batch_size=4", *read, *words)
        printed = capfd.readouterr().out
        assert "docvqa train: 3 examples; dropped 1 whose prompt leaves no room for the answer" in printed
        assert result_of(job)["data"]["data"]["n"] == 3


def test_examples_are_shown_where_a_whole_answer_has_room(tiny_weights: Path, picture_folder: Any) -> None:
    """The prompt that fills the context up to the answer, one with a letter more, and two that training takes."""
    stage = stage_of(tiny_weights)
    model = stage.model
    template = len(prompt_ids(model.tokenizer, "w", model.config, training=True)) - 2
    room = 4096 - 80 - template
    folder = picture_folder("own", ["w" * length for length in (room - 7, room - 8, room - 1, 3, 4, room + 9)])
    data = Folder(root=folder, max_new_tokens=8, suffix="")
    drop_too_long({"own": data}, stage)
    assert [len(data[i].question) for i in range(len(data))] == [room - 7, room - 8, room - 1, 3, 4]
    assert [len(sample.question) for sample in first_that_fit(data, stage, 2)] == [room - 8, 3]
    assert [len(row["question"]) for row in draw_examples(stage, data, None)] == [room - 8, 3, 4]
    data.keep(lambda sample: len(sample.question) == room - 1, "that can be answered")
    assert draw_examples(stage, data, None) == []


def test_what_a_gate_asks_is_read_with_the_turns_before_it(tiny_weights: Path, tmp_path: Path) -> None:
    stage = stage_of(tiny_weights)
    model = stage.model
    llava(tmp_path / "data", ["xy?"])
    file = tmp_path / "data" / "talks.json"
    (talk,) = json.loads(file.read_text())
    file.write_text(json.dumps([{**talk, "conversations": talk["conversations"] * 2}]))
    lengths = []
    for history in (False, True):
        data = Llava(json=file, images=tmp_path / "data" / "images", rounds="all", history=history, max_new_tokens=2)
        lengths.append([row["n_prefix"] for row in answered(stage, data, 2)])
    alone, told = (len(prompt_ids(model.tokenizer, "xy?", model.config, history=h)) for h in ((), ("xy?", "it is")))
    assert lengths == [[alone + 79] * 2, [alone + 79, told + 79]] and told > alone + len("xy?")


def test_a_gate_s_question_that_cannot_be_answered_is_found_before_the_training(
    train_here: Here, picture_folder: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = picture_folder("asked", ["short", LONG])
    monkeypatch.setattr("experiments.train.build_trainer", lambda *_: pytest.fail("a training was begun"))
    check = f"{{_target_: experiments.data.folder.Folder, root: {folder}}}"
    job = train_here(*WORDS, f"++check={check}", "++gate={all: 0}", ok=False)
    assert "1.png#0: 6" in (error := capfd.readouterr().err) and "do not fit into the model's context" in error
    assert not job.exists()


def test_nothing_to_learn_from_is_one_sentence(
    train_here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = train_here(*WORDS, *llava(tmp_path / "data", [LONG, LONG]), ok=False)
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "talks: none of its 2 examples can be learned from: dropped 2 whose prompt leaves no room" in error
    assert not job.exists(), "what was refused before it began leaves no row"


def test_a_mixture_is_trained_on(train_here: Here, picture_folder: Any) -> None:
    folder = picture_folder("own", ["how many?"] * 3)
    job = train_here(*WORDS, "data=mixture", f"data.parts.own.root={folder}", "data.weights.own=2")
    data = result_of(job)["data"]
    assert {name: part["n"] for name, part in data.items()} == {"glyphs": 1_000_000, "own": 3}
