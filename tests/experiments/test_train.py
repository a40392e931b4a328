"""The `train` command: stages with thresholds, adapters that `eval` takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from experiments.jobs.distributed import Ranks
from experiments.jobs.job import Job
from experiments.jobs.results import Identity
from experiments.train import changed_data, check_gate, keep_data
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


def test_a_finished_training_is_not_skipped_when_its_data_has_changed(
    train_here: Here, picture_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    data = picture_folder("mine", ["how many?"] * 3)
    words = ("data=folder", f"data.root={data}", "selector=pooled", "optim.steps=1", "batch_size=2", "study=s")
    job = train_here(*words)
    content = result_of(job)["data"]["data"]["content"]
    assert json.loads((job / "data.json").read_text()) == {"data": content}
    train_here(*words, "resume=true")
    lines = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(lines.replace('"one"', '"two"', 1))
    capfd.readouterr()
    train_here(*words, "resume=true", ok=False)
    assert "the data of data has changed since this training ended; overwrite=true" in capfd.readouterr().err
    data.rename(data.with_name("elsewhere"))
    train_here(*words, "resume=true")
    assert "finished already; its data cannot be compared (data folder" in capfd.readouterr().out


def test_a_training_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    job = Job(tmp_path, cast(Identity, None), Ranks())
    keep_data(job, {"mine": "a" * 16, "drawn": None}, going_on=False)
    keep_data(job, {"mine": "a" * 16, "drawn": None}, going_on=True)
    keep_data(job, {"mine": "a" * 16, "new": "b" * 16}, going_on=True)
    with pytest.raises(ValueError, match=r"the data of mine has changed since this training began; overwrite=true"):
        keep_data(job, {"mine": "c" * 16, "new": "b" * 16}, going_on=True)
    keep_data(job, {"mine": "c" * 16}, going_on=False)
    assert changed_data({"mine": None}, {"mine": "a"}) == changed_data({"mine": "a"}, {"mine": None}) == ""
