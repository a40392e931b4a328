"""Jobs side by side: slots on one machine, the status of each job as it ends, one exit code."""

import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus

from experiments.jobs import launchers, submitted_jobs
from experiments.jobs.launchers import JobOutcome
from experiments.schema import CONF, VERSION_BASE
from tests.experiments.conftest import Command, finish, start, table_without_times

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
submitit = pytest.importorskip("submitit")


def _occupy(began: Any, threads: int, log: Path) -> None:
    began.wait()
    with launchers.acquire_slot(threads, "cpu") as name:
        with open(log, "a") as file:
            file.write(f"+{name}\n")
        time.sleep(0.05)
        with open(log, "a") as file:
            file.write(f"-{name}\n")


def test_a_slot_holds_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    context = multiprocessing.get_context("fork")
    began = context.Event()
    jobs = [context.Process(target=_occupy, args=(began, 2, tmp_path / "log")) for _ in range(6)]
    for job in jobs:
        job.start()
    began.set()
    for job in jobs:
        job.join(60)
    lines = (tmp_path / "log").read_text().splitlines()
    busy: set[str] = set()
    most = 0
    for line in lines:
        if line[0] == "+":
            assert line[1:] not in busy, "two jobs in one slot"
            busy.add(line[1:])
        else:
            busy.remove(line[1:])
        most = max(most, len(busy))
    assert len(lines) == 12 and most == 2


def _what_a_job_sees() -> tuple[str | None, str | None]:
    with launchers.acquire_slot(None, "auto"):
        in_turn = os.environ["CUDA_VISIBLE_DEVICES"]
        with launchers.acquire_slot(None, "auto"):
            return in_turn, os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_job_sees_the_gpu_of_its_slot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real job of submitit, which starts its jobs with no GPU at all."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("PYTHONPATH", str(CONF.parent))
    monkeypatch.setenv(launchers.GPUS_VARIABLE, "")
    launchers.export_gpus()
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    assert executor.submit(_what_a_job_sees).result() == ("3", "5")


def test_a_job_without_a_launcher_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    with launchers.acquire_slot(1, "cpu") as name:
        assert name is None


@dataclass
class FakeJob:
    """A job of submitit's, as far as the waiting process sees it."""

    folder: Path
    job_id: str
    outcome: JobReturn | Exception | None = None
    """What it returned or raised; None when its process ended without a result."""
    over: bool = True

    @property
    def paths(self) -> Any:
        return submitit.core.utils.JobPaths(self.folder / "%j", self.job_id)

    def task(self, number: int) -> "FakeJob":
        return self

    def done(self) -> bool:
        if self.over and self.outcome is not None:
            self.paths.folder.mkdir(parents=True, exist_ok=True)
            self.paths.result_pickle.touch()
        return self.over

    def result(self) -> JobReturn:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


def returned(outcome: JobOutcome | None, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    result = JobReturn(status=status)
    result.return_value = outcome
    return result


def test_each_job_is_printed_once_as_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is not the main one has no line, a bug is returned for Hydra, one that died is named by its words."""
    monkeypatch.setattr(submitted_jobs, "POLL_S", 0.01)
    a, b = (JobOutcome(tmp_path / n, n == "a", line) for n, line in (("a", "ok    a"), ("b", "error: b: no")))
    line = "-" * 40
    broken = submitit.core.utils.FailedJobError(f"job 7\n{line}\nTraceback\nImportError: no torch\n{line}\nsee log")
    outcomes = [returned(a), returned(b), returned(None), returned(a, JobStatus.FAILED), broken, None]
    jobs: Any = [FakeJob(tmp_path, str(i), outcome) for i, outcome in enumerate(outcomes)]
    for job in jobs:
        job.done()
    with launchers.session() as session:
        waiting = submitted_jobs.SubmittedJobs(jobs, [[f"seed={i}"] for i in range(6)], submitted_jobs.ended_here, 0.0)
        assert waiting.wait() == outcomes[:4]
    assert (session.outcomes, session.died) == ({a.folder: True, b.folder: False}, 2)
    printed = capsys.readouterr()
    assert printed.out == "ok    a\n"
    assert printed.err.splitlines() == [
        "error: b: no",
        "error: a job could not start: ImportError: no torch",
        "error: seed=5: died without reporting a result (its process is gone): cancelled, killed, or its machine was "
        f"lost; see {tmp_path}/5/5_0_log.err",
    ]


def test_a_job_is_dead_at_the_second_look_and_not_while_the_queue_is_silent(tmp_path: Path) -> None:
    jobs: Any = [FakeJob(tmp_path, "1", over=False)]
    looks = iter([{"1": "CANCELLED"}, None, {}, {"1": "CANCELLED"}, {"1": "CANCELLED"}])
    with launchers.session() as session:
        waiting = submitted_jobs.SubmittedJobs(jobs, [["seed=1"]], lambda _: next(looks), queue_s=0.0)
        died = []
        while waiting.pending:
            waiting.poll()
            died.append(session.died)
    assert died == [0, 0, 0, 0, 1]


def test_the_next_start_clears_what_ended_jobs_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"here-{os.getpid()}", f"here-{ended.pid}", "here-%j", f"there-{ended.pid}", "7", "7_0", "8", "8_0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(submitted_jobs, "states_in_slurm", lambda jobs: {"7_0": "COMPLETED"})
    over = [*submitted_jobs.over_here(tmp_path, "here"), *submitted_jobs.over_in_slurm(tmp_path)]
    assert sorted(over) == sorted([f"here-{ended.pid}", "here-%j", "7", "7_0"])
    monkeypatch.setattr(submitted_jobs, "states_in_slurm", lambda jobs: None)
    assert submitted_jobs.over_in_slurm(tmp_path) == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_stops_its_jobs_and_says_so_in_one_line(
    sent: signal.Signals, code: int, tiny_weights: Path, tmp_path: Path
) -> None:
    """Ctrl+C goes to all processes of a terminal, SIGTERM to one."""
    words = ["-m", f"model.path={tiny_weights}", "selector=pooled,random", "data.n=960", "batch_size=2", "study=s"]
    words += ["threads=1", "device=cpu", "shots=0", "hydra/launcher=local"]
    process = start("eval", *words, cwd=tmp_path, session=True)
    study = tmp_path / "outputs/s"
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in study.glob("*/journal*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
    ended, _, err = finish(process)
    assert (ended, err) == (code, ["error: interrupted; the same command with resume=true goes on from here"])
    folders = list(study.glob(".submitit/*-*[0-9]"))
    assert len(folders) == 2
    for folder in folders:
        assert not submitted_jobs.runs(int(folder.name.rpartition("-")[2]))
        assert "Traceback" not in "".join(log.read_text() for log in folder.glob("*_log.err"))


def test_side_by_side_fills_the_same_table(tiny_weights: Path, tmp_path: Path, command: Command) -> None:
    """One of the jobs cannot run: the others' rows are there, its reason is printed, the exit code is 1."""
    words = ["-m", f"model.path={tiny_weights}", "study=s", "selector=pooled,random", "budget=999", "data.n=8"]
    words += ["threads=1", "device=cpu"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    code, out, err = finish(start("eval", *words, "hydra/launcher=local", cwd=together))
    assert command("eval", *words, cwd=alone).code == code == 1
    (reason,) = [line for line in err if line.startswith("error: ")]
    assert "selector-random" in reason and "999" in reason
    assert sum(line.startswith("ok ") for line in out.splitlines()) == 1
    assert "Traceback" not in "\n".join(err)
    assert table_without_times(together / "outputs/s") == table_without_times(alone / "outputs/s")


@pytest.mark.parametrize(
    ("command", "words", "nodes", "tasks"),
    [
        ("eval", ["hydra.launcher.gpus_per_node=8"], 1, 1),
        ("train", ["hydra.launcher.gpus_per_node=8"], 1, 1),
        ("train", ["trainer=ddp", "hydra.launcher.gpus_per_node=8"], 1, 8),
        ("train", ["trainer=fsdp", "trainer.num_nodes=2", "hydra.launcher.gpus_per_node=4"], 2, 4),
        ("train", ["trainer=ddp", "trainer.num_nodes=2"], 2, 1),
        ("train", ["trainer=ddp", "hydra.launcher.gpus_per_node=8", "hydra.launcher.tasks_per_node=2"], 1, 2),
    ],
)
def test_a_slurm_job_has_a_task_for_each_gpu_of_a_shared_training(
    command: str, words: list[str], nodes: int, tasks: int
) -> None:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name=command):
        launcher = compose(command, ["hydra/launcher=slurm", *words], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmJobs")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.timeout_min) == (nodes, tasks, 1440)


def test_a_gpu_in_parts_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "GPU 0: H100 (UUID: GPU-1)\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\nGPU 1: H100 (UUID: GPU-2)\n"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launchers.shutil, "which", lambda name: name)
    monkeypatch.setattr(launchers.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=listed, returncode=0))
    assert launchers.visible_gpus() == ["0", "1"]
