"""train.py: stages with gates, adapters that eval.py takes."""

import json
from pathlib import Path

import pytest

from experiments.train import check_gate
from tests.experiments.conftest import finish, start

SMALL = ["model=tiny_scratch", "model.config.vision.hidden_size=16", "model.config.lm.d_model=16", "threads=1"]


def test_a_gate_names_what_fell_short() -> None:
    check_gate({"fine": 0.4}, {"fine": 0.35})
    with pytest.raises(ValueError, match="fine is 0.300, it must be at least 0.35"):
        check_gate({"fine": 0.3, "guard": 1.0}, {"fine": 0.35})
    with pytest.raises(ValueError, match="gate.letters: this stage measures fine"):
        check_gate({"fine": 0.3}, {"letters": 0.35})


def test_an_adapter_is_trained_named_and_evaluated(tmp_path: Path) -> None:
    weights = tmp_path / "base"
    scratch = [*SMALL, f"weights={weights}", "stage=align", "optim.steps=2", "optim.warmup=0"]
    scratch += ["gate.glyphs=-100", "gate.chart=-100"]
    code, out, err = finish(start("train", *scratch, "study=s", cwd=tmp_path))
    assert (code, err) == (0, []), err
    (stage,) = json.loads((weights / "training.json").read_text())["stages"]
    assert stage["stage"] == "align" and stage["seed"] == 0 and "glyphs" in stage["gate"]

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
    command = [*SMALL, f"weights={weights}", "stage=align", "optim.steps=1", "optim.warmup=0", "gate.glyphs=1"]
    code, _, err = finish(start("train", *command, cwd=tmp_path))
    assert code == 1 and len(err) == 1 and "did not pass its gate" in err[0]
    assert not weights.exists()
