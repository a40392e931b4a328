"""The `train` command: stages with thresholds, adapters that `eval` takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from experiments.data.benchmarks.hub import Found
from experiments.jobs.distributed import Ranks
from experiments.jobs.job import CHECKPOINT, Job
from experiments.jobs.results import Identity
from experiments.train import changed_data, check_gate, keep_data
from experiments.training.callbacks import read_points
from experiments.training.run_logger import RunLogger
from tests.data import official
from tests.experiments.conftest import Command, Here, result_of

ALIGN = ["study=s", "stage=align", "pictures={glyphs: 2, chart: 2}"]


def test_a_gate_names_what_fell_short() -> None:
    check_gate({"fine": 0.4}, {"fine": 0.35})
    with pytest.raises(ValueError, match="fine is 0.300, it must be at least 0.35"):
        check_gate({"fine": 0.3, "guard": 1.0}, {"fine": 0.35})
    with pytest.raises(ValueError, match="gate.letters: this stage measures fine"):
        check_gate({"fine": 0.3}, {"letters": 0.35})


def test_a_training_that_is_stopped_while_its_logger_ends_keeps_its_checkpoint(
    train_here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is not written yet: without the checkpoint, resuming would train everything again."""
    words = ["study=s", "selector=shirg", "optim.steps=4", "batch_size=2", "trainer.checkpoint_every=2"]
    with monkeypatch.context() as context:
        context.setattr(RunLogger, "end", fails)
        folder = train_here(*words, ok=False)
    assert (folder / CHECKPOINT).is_file() and result_of(folder)["status"] == "failed"
    steps = len(read_points(folder / "metrics.csv"))
    assert train_here(*words, "resume=true") == folder and result_of(folder)["status"] == "ok"
    assert len(read_points(folder / "metrics.csv")) == steps
    assert not (folder / CHECKPOINT).parent.exists()


def fails(*_: object) -> None:
    raise OSError("the network is down")


def test_the_stages_before_are_known_from_every_folder(train_here: Here) -> None:
    """A shipped model is found from anywhere, and so is what it was trained by."""
    folder = train_here("model.path=weights/tiny", "selector=shirg", "optim.steps=1", "batch_size=2")
    stages = [stage["stage"] for stage in json.loads((folder / "adapter/training.json").read_text())["stages"]]
    assert stages == ["vision", "text", "align", "base", "adapt"]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("optim.betas=[2,3]", "optim.betas=[2.0, 3.0]: give two numbers in [0, 1)"),
        ("objective.alignment=-1", "objective.alignment=-1.0: give a weight >= 0"),
        ("trainer.clip=-1", "trainer.clip=-1.0: give a number from 0.0"),
        ("trainer.log_every=0", "trainer.log_every=0: give a number from 1"),
        (f"weights=/{'a' * 5000}", "aaa... (5,001 characters) is too long for the name of a file"),
        ("weights=a_file", "weights=a_file: there is a file, not a folder"),
        ("weights=a_file/inside", "weights=a_file/inside: there is a file, not a folder"),
    ],
)
def test_what_would_stop_a_training_is_refused_before_its_model_is_built(
    word: str,
    sentence: str,
    train_here: Here,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a_file").touch()
    monkeypatch.setattr("experiments.build.build_model", lambda *_: pytest.fail("the model was built"))
    train_here("selector=shirg", "optim.steps=2", word, ok=False)
    assert sentence in capfd.readouterr().err


def test_a_precision_that_would_change_the_weights_is_refused(command: Command) -> None:
    ended = command("train", "trainer.precision=64-true")
    expected = "expected one of [32-true, 16-mixed, bf16-mixed]"
    assert ended.code == 1 and ended.err == [f"error: trainer.precision=64-true: Invalid value '64-true', {expected}"]


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


def test_a_training_on_official_files_knows_them(
    train_here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    read = official.write("docvqa", "disk", tmp_path / "pages", "train", 4)
    words = (*read, "selector=pooled", "optim.steps=1", "batch_size=2", "study=s")
    job = train_here(*words)
    (data,) = result_of(job)["data"].values()
    assert json.loads((job / "data.json").read_text()) == {"data": data["content"]}
    assert (data["n"], data["dropped"], data["found"]) == (4, {}, {"source": "disk"})
    train_here(*words, "resume=true")
    (file,) = (tmp_path / "pages").rglob("*.json")
    text = file.read_text()
    file.write_text(text.replace('"page 2"', '"page 9"'))
    capfd.readouterr()
    train_here(*words, "resume=true", ok=False)
    assert "the data of data has changed since this training ended; overwrite=true" in capfd.readouterr().err
    file.write_text(text)
    train_here(*words, "resume=true")
    Image.new("RGB", (50, 50)).save(tmp_path / "pages/train/documents/page_0.png")
    train_here(*words, "resume=true", ok=False)


def test_a_training_on_the_hub_records_the_commit(
    train_here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Found, "revision", "0123456789abcdef0123456789abcdef01234567")
    read = official.write("docvqa", "hub", tmp_path / "pages", "train", 4)
    (data,) = result_of(train_here(*read, "selector=pooled", "optim.steps=1", "batch_size=2"))["data"].values()
    revision = "0123456789abcdef0123456789abcdef01234567"
    assert data["found"] == {"source": "hub", "id": str(tmp_path / "pages"), "split": "train", "revision": revision}
    assert len(data["content"]) == 16


def test_a_training_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    job = Job(tmp_path, cast(Identity, None), Ranks())
    keep_data(job, {"mine": "a" * 16, "drawn": None}, going_on=False)
    keep_data(job, {"mine": "a" * 16, "drawn": None}, going_on=True)
    keep_data(job, {"mine": "a" * 16, "new": "b" * 16}, going_on=True)
    with pytest.raises(ValueError, match=r"the data of mine has changed since this training began; overwrite=true"):
        keep_data(job, {"mine": "c" * 16, "new": "b" * 16}, going_on=True)
    keep_data(job, {"mine": "c" * 16}, going_on=False)
    assert changed_data({"mine": None}, {"mine": "a"}) == changed_data({"mine": "a"}, {"mine": None}) == ""
