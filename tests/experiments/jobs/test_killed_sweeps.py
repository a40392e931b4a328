"""Sweeps on one machine that are killed, workers included, or lose one job: nothing is lost, nothing is done twice."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.jobs.answer_journal import JOURNAL
from tests.experiments.conftest import finish, journaled, result_of, start, table_without_times

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

LOCAL = "hydra/launcher=local"
DIED = "error: 1 job died without reporting a result. Rerun the same command with resume=true to run the missing ones."
Answer = tuple[str, float]
"""A sample's id and the milliseconds of its denoising: a sample that is answered again takes another time."""


@pytest.fixture(scope="module")
def two_jobs(tiny_weights: Path) -> list[str]:
    words = ["experiment=B0,P1", "data.n=480", "batch_size=4", "threads=1", "device=cpu", "study=s", "shots=2"]
    return ["-m", f"model.path={tiny_weights}", *words]


@pytest.fixture(scope="module")
def calm(two_jobs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of an undisturbed run, in one process."""
    home = tmp_path_factory.mktemp("calm")
    code, _, err = finish(start("eval", *two_jobs, cwd=home))
    assert (code, err) == (0, [])
    return home / "outputs/s"


def test_a_killed_sweep_goes_on(two_jobs: list[str], calm: Path, tmp_path: Path) -> None:
    study = tmp_path / "outputs/s"
    answered = killed(start("eval", *two_jobs, LOCAL, cwd=tmp_path, session=True), study, after=16)
    code, out, err = finish(start("eval", *two_jobs, LOCAL, "resume=true", cwd=tmp_path))
    assert (code, err) == (0, [])
    assert out.count("\nok ") + out.startswith("ok ") == 2
    check(study, calm, answered)


def test_a_job_that_dies_takes_no_other_with_it(two_jobs: list[str], calm: Path, tmp_path: Path) -> None:
    """The waiting process says so at once, and waits for the rest."""
    study = tmp_path / "outputs/s"
    # A single slot: the second job waits for its turn.
    cores = len(os.sched_getaffinity(0))
    process = start("eval", *two_jobs, f"threads={cores}", LOCAL, cwd=tmp_path)
    assert process.stderr is not None
    wait(process, study, 8)
    (journal,) = study.glob("*/journal.arrow")
    os.kill(writer(journal), signal.SIGKILL)
    line = process.stderr.readline()
    assert not list(study.glob("*/samples.parquet")), "printed only after all jobs had ended"
    first = "B0" if "B0" in journal.parent.name else "P1"
    assert line.startswith("error: ") and f"experiment={first} " in line
    assert ": died without reporting a result (its process is gone): " in line
    code, out, err = finish(process)
    assert code == 1
    assert err == [DIED]
    assert out.count("\nok ") + out.startswith("ok ") == 1
    (row,) = (row for row in table_without_times(study) if row["status"] == "ok")
    (whole,) = (other for other in table_without_times(calm) if other["job"] == row["job"])
    for key in (key for key in whole if key.startswith(("exact_match", "subset", "recall", "visual tokens", "ids"))):
        assert row.get(key, "") == whole[key], key  # a column without a value in any row is not there
    assert result_of(journal.parent)["status"] == "running"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_kills_at_random_times(tmp_path: Path) -> None:
    """The whole main table of the shipped model and its adapters."""
    words = ["sweep=main_table", "limit=96", "batch_size=4", "threads=1", "device=cpu", "study=s", "shots=1"]
    code, _, err = finish(start("eval", *words, cwd=tmp_path / "calm"))
    assert (code, err) == (0, [])
    study = tmp_path / "rough/outputs/s"
    draw = random.Random(time.time_ns())
    total = 12 * 96
    moments = sorted(draw.sample(range(20, total - 60), 3))
    print("killed after answers", moments)
    answered: dict[str, list[Answer]] = {}
    for moment in moments:
        process = start("eval", *words, LOCAL, "resume=true", cwd=tmp_path / "rough", session=True)
        before = answered
        answered = killed(process, study, moment)
        for job, answers in before.items():
            assert answered[job][: len(answers)] == answers, "a sample was answered twice"
    code, out, err = finish(start("eval", *words, LOCAL, "resume=true", cwd=tmp_path / "rough"))
    assert (code, err) == (0, [])
    assert len(table_without_times(study)) == 12
    check(study, tmp_path / "calm/outputs/s", answered)


def killed(process: subprocess.Popen[str], study: Path, after: int) -> dict[str, list[Answer]]:
    """Kills the sweep and its jobs once so many samples are answered; what each job has then."""
    wait(process, study, after)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    return dict(answers(study))


def wait(process: subprocess.Popen[str], study: Path, samples: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if sum(len(found) for _, found in answers(study)) >= samples:
            return
        time.sleep(0.01)
    raise AssertionError(f"{samples} answers never came: {process.poll()}")


def answers(study: Path) -> Iterator[tuple[str, list[Answer]]]:
    """What each job has answered so far, in its journal or, when it has finished, in its samples."""
    for folder in study.glob("eval_*/"):
        batches = journaled(folder / JOURNAL) if (folder / JOURNAL).exists() else []
        if batches:
            yield folder.name, [(row["id"], row["ms_denoise"]) for batch in batches for row in batch]
        elif (folder / "samples.parquet").exists():
            yield folder.name, finished(folder)


def finished(folder: Path) -> list[Answer]:
    columns = pq.read_table(folder / "samples.parquet", columns=["id", "ms_denoise"]).to_pydict()
    return list(zip(columns["id"], columns["ms_denoise"], strict=True))


def check(study: Path, calm: Path, answered: dict[str, list[Answer]]) -> None:
    """The table of an undisturbed run, made of every answer that was there, each once."""
    assert table_without_times(study) == table_without_times(calm)
    assert answered and {path.name for path in calm.glob("eval_*/")} == {path.name for path in study.glob("eval_*/")}
    for folder in study.glob("eval_*/"):
        ids = [name for name, _ in finished(folder)]
        before = answered.get(folder.name, [])
        assert finished(folder)[: len(before)] == before, "a sample was answered twice"
        assert len(set(ids)) == len(ids) and ids == [name for name, _ in finished(calm / folder.name)]
        assert not (folder / "journal.arrow").exists()


def writer(file: Path) -> int:
    """The process that holds a file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == file:
                return int(descriptor.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody writes {file}")
