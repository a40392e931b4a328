"""A job: killed, resumed, skipped, refused; the same numbers every time."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from experiments.jobs.results import LOCK
from tests.experiments.conftest import finish, journaled, lasting, result_of, rows_of, start, table_without_times

Eval = Callable[..., Path]


def test_a_killed_job_ends_with_the_table_of_an_undisturbed_one(tiny_weights: Path, tmp_path: Path) -> None:
    command = [f"model.path={tiny_weights}", "study=s", "selector=shirg", "data.n=480", "batch_size=4", "threads=1"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm.mkdir()
    rough.mkdir()

    killed = start("eval", *command, cwd=rough)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list((rough / "outputs").glob("s/*/journal.arrow"))
        if found and len(journaled(found[0])) >= 3:
            break
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    (journal,) = (rough / "outputs").glob("s/*/journal.arrow")
    before = journaled(journal)
    assert 3 <= len(before) < 120, "killed too early or too late"
    assert result_of(journal.parent)["status"] == "running"
    # What a power cut adds: the beginning of a batch that never got to the disk.
    with open(journal, "ab") as file:
        file.write(bytes(100))

    for folder, extra in ((rough, ["resume=true"]), (calm, [])):
        code, out, err = finish(start("eval", *command, *extra, cwd=folder))
        assert (code, err) == (0, []), err
        assert out.rstrip().splitlines()[-1] == "table: outputs/s/table.md   report: outputs/s/report.html"

    (rough_job,), (calm_job,) = ((root / "outputs/s").glob("eval_*/") for root in (rough, calm))
    assert rows_of(rough_job) == rows_of(calm_job)
    ids = [row["id"] for row in rows_of(rough_job)]
    assert len(ids) == len(set(ids)) == 480
    first = [row["id"] for batch in before for row in batch]
    assert ids[: len(first)] == first
    assert lasting(result_of(rough_job)) == lasting(result_of(calm_job))
    assert table_without_times(rough / "outputs/s") == table_without_times(calm / "outputs/s")
    assert not (rough_job / "journal.arrow").exists()


def test_two_runs_give_the_same_result_but_for_times(eval_here: Eval, tmp_path: Path) -> None:
    jobs = [eval_here("selector=shirg", "limit=40", root=tmp_path / name) for name in ("a", "b")]
    first, second = (result_of(job) for job in jobs)
    assert lasting(first) == lasting(second)
    assert first["times"].keys() == second["times"].keys()
    assert [row for row in rows_of(jobs[0])] == [row for row in rows_of(jobs[1])]
    shots = [{p.name: p.read_bytes() for p in (job / "shots").iterdir()} for job in jobs]
    assert len(shots[0]) == 8 * 4 + 2
    assert shots[0] == shots[1]


@pytest.mark.parametrize("selector", ["shirg", "random"])
def test_kept_tokens_do_not_depend_on_batch_mates_threads_or_random_state(selector: str, eval_here: Eval) -> None:
    import torch

    kept = []
    for overrides in (["batch_size=1", "threads=1"], ["batch_size=7", "threads=2"], ["batch_size=24", "threads=1"]):
        torch.manual_seed(len(kept))
        rows = rows_of(eval_here(f"selector={selector}", "data.n=24", f"study={len(kept)}", *overrides))
        kept.append({row["id"]: row["kept"] for row in rows})
        assert all(len(tokens) == (64 if selector == "shirg" else 80) for tokens in kept[-1].values())
    assert kept[0] == kept[1] == kept[2]


def test_a_finished_job_is_skipped_or_run_again(eval_here: Eval, capfd: pytest.CaptureFixture[str]) -> None:
    job = eval_here("selector=pooled", "limit=4")
    stamp = (job / "result.json").stat().st_mtime_ns
    for more in ([], ["resume=true"]):
        eval_here("selector=pooled", "limit=4", *more)
        assert "finished already" in capfd.readouterr().out
    assert (job / "result.json").stat().st_mtime_ns == stamp
    again = result_of(job)
    eval_here("selector=pooled", "limit=4", "overwrite=true")
    assert (job / "result.json").stat().st_mtime_ns > stamp
    assert lasting(result_of(job)) == lasting(again)
    eval_here("selector=pooled", "limit=4", "overwrite=true", "resume=true", ok=False)
    assert "give one of them" in capfd.readouterr().err


def test_a_config_that_changed_under_its_folder_is_refused(eval_here: Eval, capfd: pytest.CaptureFixture[str]) -> None:
    """A YAML edit does not change the folder's name; the hash tells."""
    job = eval_here("selector=shirg", "limit=4")
    result = result_of(job)
    result["config"]["selector"]["weights"]["similarity"] = 0.5
    result["config_hash"] = "0" * 16
    (job / "result.json").write_text(json.dumps(result))
    for mode in ("resume=true", "resume=false"):
        eval_here("selector=shirg", "limit=4", mode, ok=False)
        assert "another config (different now: selector.weights.similarity)" in capfd.readouterr().err
    eval_here("selector=shirg", "limit=4", "overwrite=true")


def test_a_failed_job_that_answered_nothing_runs_again_without_overwrite(eval_here: Eval) -> None:
    job = eval_here("selector=random", "limit=4", "budget=999", ok=False)
    assert result_of(job)["status"] == "failed"
    result = result_of(job)
    eval_here("selector=random", "limit=4", "budget=999", ok=False)
    assert lasting(result_of(job)) == lasting(result)


def stopped(eval_here: Eval, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Path:
    """A job that died after its second batch."""
    calls = iter(range(2))

    def dies(*_: object) -> None:
        if next(calls) == 1:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("experiments.progress.Progress.advance", lambda self, n: dies() if n == 2 else None)
        job = eval_here(*arguments, ok=False)
    assert len(journaled(job / "journal.arrow")) == 2
    return job


def test_answers_of_other_weights_are_not_mixed_in(
    eval_here: Eval, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("selector=pooled", "limit=8", "batch_size=2")
    job = stopped(eval_here, monkeypatch, *arguments)
    eval_here(*arguments, ok=False)
    assert "was stopped in the middle: resume=true keeps what it has" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("experiments.build.fingerprint", lambda model: "f" * 64)
        eval_here(*arguments, "resume=true", ok=False)
    assert "was begun with other weights" in capfd.readouterr().err
    eval_here(*arguments, "resume=true")
    assert len(rows_of(job)) == 8


@pytest.mark.parametrize("session", ["overwrite=false", "overwrite=true"])
def test_a_job_that_slurm_starts_again_goes_on(session: str, eval_here: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the command line of its first start, which knew nothing of the journal."""
    arguments = ("selector=pooled", "limit=8", "batch_size=2")
    job = stopped(eval_here, monkeypatch, *arguments)
    before = [{key: row[key] for key in ("id", "ms_denoise")} for row in sum(journaled(job / "journal.arrow"), [])]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    eval_here(*arguments, session)
    rows = pq.read_table(job / "samples.parquet", columns=["id", "ms_denoise"]).to_pylist()
    assert len(rows) == 8
    assert rows[:4] == before, "answered again"


def test_two_processes_do_not_share_a_folder(eval_here: Eval, capfd: pytest.CaptureFixture[str]) -> None:
    job = eval_here("selector=pooled", "limit=4")
    before = (job / "result.json").read_bytes()
    with FileLock(job / LOCK):
        eval_here("selector=pooled", "limit=4", "overwrite=true", ok=False)
    assert "another process is running this job" in capfd.readouterr().err
    assert (job / "result.json").read_bytes() == before


def test_a_result_that_is_no_json_is_named(eval_here: Eval, capfd: pytest.CaptureFixture[str]) -> None:
    job = eval_here("selector=pooled", "limit=4")
    (job / "result.json").write_text("{")
    eval_here("selector=pooled", "limit=4", "resume=true", ok=False)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{job / 'result.json'} is not valid JSON" in line and "delete it and run the job again" in line


def test_what_was_asked_for_is_written_down(eval_here: Eval) -> None:
    result = result_of(eval_here("selector=random", "budget=wide", "limit=6", "decode.step_ratio=0.7"))
    assert result["choices"]["selector"] == "random"
    assert result["config"]["budget"] == "wide"
    assert result["selector"]["budget"] == 100
    assert result["tokens"]["visual"] == {"mean": 100, "min": 100, "max": 100}
    assert result["tokens"]["by_source"]["kept"] == 100
    assert result["data"]["n"] == 6
    assert result["command"].startswith("python eval.py model.path=")
    assert result["model"]["trained"] is False
    assert result["environment"]["device"] == "cpu"
    assert set(result["times"]["ms_per_sample"]) >= {
        "views",
        "tower",
        "select",
        "project",
        "prefill",
        "denoise",
        "total",
    }


def test_workers_change_nothing_but_the_time(eval_here: Eval) -> None:
    words = ("selector=shirg", "data.n=20", "batch_size=8", "shots=2")
    calm, ahead = (eval_here(f"study={n}-workers", f"workers={n}", *words) for n in (0, 1))
    assert rows_of(calm) == rows_of(ahead)
    drawn = list((calm / "shots").glob("*.*"))
    assert len(drawn) >= 2
    for picture in drawn:
        assert picture.read_bytes() == (ahead / picture.relative_to(calm)).read_bytes()
    assert calm.name == ahead.name, "how many workers there are does not make another job"
