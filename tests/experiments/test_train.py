"""The `train` command: stages with thresholds, adapters that `eval` takes."""

import json
from pathlib import Path

import pytest

from experiments.train import check_gate
from tests.experiments.conftest import Command, Here, result_of

ALIGN = ["study=s", "stage=align", "pictures={glyphs: 2, chart: 2}"]


def test_a_gate_names_what_fell_short() -> None:
    check_gate({"fine": 0.4}, {"fine": 0.35})
    with pytest.raises(ValueError, match="fine is 0.300, it must be at least 0.35"):
        check_gate({"fine": 0.3, "guard": 1.0}, {"fine": 0.35})
    with pytest.raises(ValueError, match="gate.letters: this stage measures fine"):
        check_gate({"fine": 0.3}, {"letters": 0.35})


def test_an_adapter_is_trained_named_and_evaluated(
    train_here: Here, command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A base of its own, an adapter on it, and the command that was printed, as a user would type it."""
    base = tmp_path / "base"
    train_here(*ALIGN, f"weights={base}", "optim.steps=2", "gate.glyphs=-100", "gate.chart=-100")
    (stage,) = json.loads((base / "training.json").read_text())["stages"]
    assert stage["stage"] == "align" and stage["seed"] == 0 and "glyphs" in stage["gate"]
    train_here(f"model.path={base}", "selector=shirg", "lora.rank=64", "optim.steps=2", "study=s")
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("evaluate python eval.py")]
    words = printed[-1].removeprefix("evaluate ").split()
    assert words[:2] == ["python", "eval.py"]
    ended = command("eval", *words[2:], "study=s", "data.n=12", "threads=1")
    assert (ended.code, ended.err) == (0, []), ended.err
    assert "shirg" in ended.out


def test_a_failed_gate_writes_no_weights(train_here: Here, tmp_path: Path) -> None:
    weights = tmp_path / "w"
    folder = train_here(*ALIGN, f"weights={weights}", "optim.steps=1", "gate.glyphs=1", ok=False)
    assert "did not pass its gate" in result_of(folder)["reason"]
    assert not weights.exists()
