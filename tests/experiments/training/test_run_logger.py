"""What a job sends to its logger: curves, numbers, overlays; one run for each job, closed however the job ends."""

import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.training.callbacks import read_points
from experiments.training.run_logger import flat_numbers, numbers
from lavida_adapter import Lavida
from tests.experiments.conftest import Command, Here, finish, result_of, start
from tests.experiments.training.runs import last_step, runs_of, wait_for_step
from tests.lavida_adapter.training_runs import poisoned

wandb = pytest.importorskip("wandb")

WORDS = ["selector=shirg", "optim.steps=4", "batch_size=4", "trainer.log_every=2", "study=s", "logger=wandb"]
CHECK = "{_target_: experiments.data.synthetic.glyphs.SynthGlyphs, split: val, n: 8, density: sparse, qa_per_image: 2}"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes its own word into this variable, for good."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_training_sends_its_curve_its_result_and_overlays(train_here: Here) -> None:
    words = ["selector.coord_embed=sincos_linear", "selector.coord_width=auto", "++optim.rates.selector=0.002"]
    words += ["lora.train_whole=[selector.coords.linear]", f"++check={CHECK}", "++gate={fine: 0}"]
    folder = train_here(*WORDS, *words)
    (run,) = runs_of(folder)
    about = run.one("run")
    assert about.run_group == "s" and about.job_type == "train" and about.project == "shirg"
    assert list(about.tags) == ["tiny", "synth_glyphs_train", "shirg"] and about.display_name == folder.name
    assert about.run_id == (folder / "wandb-id").read_text() and run.exit_code == 0
    result = result_of(folder)
    assert {k: v for k, v in run.config.items() if k in result["config"]} == result["config"]
    assert run.config["command"] == result["command"] and run.config["choices"]["lora"] == "tiny"

    points = read_points(folder / "metrics.csv")
    assert [p["step"] for p in points] == [2, 4]
    for name in points[0].keys() - {"step"}:
        assert run.history(name) == [(p["step"], p[name]) for p in points], name
    assert {"loss", "grad_norm", "lr", "lr_selector"} <= points[0].keys()
    assert points[0]["lr_selector"] / points[0]["lr"] == pytest.approx(0.002 / result["config"]["optim"]["lr"])
    for name in ("tokens_per_s", "samples_per_s", "peak_mib"):
        assert [step for step, _ in run.history(name)] == [2, 4] and run.history(name)[1][1] > 0, name

    assert run.summary["training loss"] == result["training"]["loss"]
    assert run.summary["gate fine"] == result["training"]["gate"]["fine"]
    assert not any("training loss" in row for row in run.rows), "a number is no curve"
    (kept,) = [row for row in run.rows if "kept tokens.count" in row]
    assert kept["kept tokens.count"] == 4 == len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png")))
    assert len(kept["kept tokens.captions"]) == 4 and all(" -> " in text for text in kept["kept tokens.captions"])
    (table,) = [row for row in run.rows if "samples.nrows" in row]
    assert table["samples.nrows"] == 4


def test_an_evaluation_sends_its_result(eval_here: Here) -> None:
    folder = eval_here("selector=pooled", "limit=6", "logger=wandb", "shots=3")
    (run,) = runs_of(folder)
    assert run.exit_code == 0 and run.one("run").job_type == "eval"
    quality = result_of(folder)["quality"]["metrics"]["exact_match"]
    assert run.summary["tokens visual"] == 88 and run.summary["exact_match"] == quality["mean"]
    for path in folder.glob("wandb/offline-run-*/files/media/images/*.png"):
        assert max(Image.open(path).size) == 512
    assert [row["samples.nrows"] for row in run.rows if "samples.nrows" in row] == [6]
    assert [row["kept tokens.count"] for row in run.rows if "kept tokens.count" in row] == [3]


def test_a_run_that_does_not_end_well_is_marked_as_failed(train_here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Lavida, "loss", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_here(*WORDS, "seed=1")
        patch.setattr(Lavida, "loss", lambda *_, **__: 1 / 0)
        train_here(*WORDS, "seed=2", ok=False)
    poisoned(monkeypatch, 0, gradient=False)
    folder = train_here(*WORDS, "seed=3", ok=False)
    assert "the loss of step 0 is nan" in result_of(folder)["reason"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for path in sorted(folder.parent.glob("train_*")):
        (run,) = runs_of(path)
        assert run.exit_code == 1 and run.history("loss") == []


def test_a_terminated_run_is_closed_and_goes_on_under_its_id(
    command: Command, tiny_weights: Path, tmp_path: Path
) -> None:
    words = [f"model.path={tiny_weights}", "optim.warmup=0", "threads=1", *WORDS]
    words += ["optim.steps=60", "trainer.checkpoint_every=4"]
    process = start("train", *words, cwd=tmp_path)
    wait_for_step(process, tmp_path, 8)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "outputs/s").glob("train_*")
    (run,) = runs_of(folder)
    assert run.exit_code == 1 and run.history("loss")[-1][0] >= 6  # a point is in the file before it is sent
    at = last_step(folder)
    ended = command("train", *words, "resume=true")
    assert ended.code == 0, ended.err
    first, second = runs_of(folder)
    assert first.one("run").run_id == second.one("run").run_id
    assert (first.exit_code, second.exit_code) == (1, 0)
    # The second holds the whole curve, and the throughput of its own session.
    assert second.history("loss") == [(p["step"], p["loss"]) for p in read_points(folder / "metrics.csv")]
    assert second.history("peak_mib")[0][0] > at


def test_every_job_of_a_sweep_has_a_run_of_its_own(command: Command, tiny_weights: Path, tmp_path: Path) -> None:
    words = [f"model.path={tiny_weights}", "optim.warmup=0", "threads=1", "device=cpu", *WORDS, "selector=random,shirg"]
    ended = command("train", "-m", *words)
    assert ended.code == 0, ended.err
    runs = [run for folder in sorted((tmp_path / "outputs/s").glob("train_*")) for run in runs_of(folder)]
    assert [run.one("run").tags[2] for run in runs] == ["random", "shirg"]
    assert len({run.one("run").run_id for run in runs}) == 2
    assert all([step for step, _ in run.history("loss")] == [2, 4] and run.exit_code == 0 for run in runs)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_online_without_a_key(name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # what a run before this one has read of the environment
    ended = command(name, "logger=wandb", "logger.offline=false", "device=cpu")
    assert ended.code == 1 and len(ended.err) == 1, ended.err
    assert ended.err[0].startswith("error: logger.offline=false: there is no key for Weights & Biases; run `wandb lo")


def test_a_logger_that_fails_takes_no_result_with_it(
    eval_here: Here, train_here: Here, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = eval_here("selector=pooled", "limit=6", "logger=csv")
    header, values = (job / "metrics/metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), values.split(","), strict=True))
    quality = result_of(job)["quality"]["metrics"]["exact_match"]
    assert float(logged["exact_match high"]) == quality["high"]
    assert float(logged["tokens visual"]) == 88

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.log_metrics", offline)
    for run, words in ((eval_here, ("selector=full", "limit=6")), (train_here, WORDS)):
        assert result_of(run(*words, "logger=csv"))["status"] == "ok"
        assert capfd.readouterr().err.count("warning: the logger failed (no route)") == 1


def test_short_names_are_unique_and_name_every_number() -> None:
    part = {"mean": 1.0, "low": 0.0}
    quality = {kind: {"x": part} for kind in ("metrics", "subtasks", "recall_subsets", "groups")}
    sections = {
        "quality": {**quality, "subsets": {"fine sparse": part}, "recall": part},
        "tokens": {"visual": part, "by_source": {"kept": 3}},
        "times": {"wall_s": 2.0, "ms_per_sample": {"total": 4.0}},
        "training": {"loss": 0.5, "gate": {"fine": 1.0}},
        "environment": {"threads": 1},
    }
    found = flat_numbers(sections)
    assert len(found) == len(list(numbers(sections))) == 19
    assert {"x", "x low", "subtask x", "recall x", "group x", "fine sparse low", "recall low"} <= found.keys()
    assert {"tokens visual", "tokens kept", "ms total", "wall_s", "training loss", "gate fine"} <= found.keys()


def test_tensorboard_gets_curves_numbers_and_overlays(train_here: Here, eval_here: Here) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder: Path) -> Any:
        found = events.EventAccumulator(str(folder / "tensorboard"))
        found.Reload()
        return found

    folder = train_here(*WORDS, "logger=tensorboard")
    found, points = read(folder), read_points(folder / "metrics.csv")
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [
        (p["step"], pytest.approx(p["loss"], rel=1e-6)) for p in points
    ]
    assert len(found.Tags()["images"]) == 4 and all(" -> " in name for name in found.Tags()["images"])

    folder = eval_here("selector=pooled", "limit=6", "logger=tensorboard", "shots=3")
    found, quality = read(folder), result_of(folder)["quality"]
    (score,) = found.Scalars("exact_match")
    assert score.value == pytest.approx(quality["metrics"]["exact_match"]["mean"]) and len(found.Tags()["images"]) == 3
