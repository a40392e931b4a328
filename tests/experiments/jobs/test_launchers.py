"""Jobs side by side: slots on one machine, the status of each job as it ends, one exit code."""

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus

from experiments.jobs import launchers
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


def returned(
    study: Path, job: str, outcome: launchers.JobOutcome | None, status: JobStatus = JobStatus.COMPLETED
) -> None:
    """Writes submitit's result file of a job."""
    folder = study / ".submitit" / job
    folder.mkdir(parents=True)
    result = JobReturn(status=status)
    result.return_value = outcome
    (folder / f"{job}_0_result.pkl").write_bytes(pickle.dumps(("success", result)))


def test_each_result_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of an earlier sweep, of a job that raised and of a rank that is not the main one are not."""
    a, b = (launchers.JobOutcome(tmp_path / n, n == "a", line) for n, line in (("a", "ok    a"), ("b", "error: b: no")))
    returned(tmp_path, "1", launchers.JobOutcome(tmp_path / "old", True, "before the sweep"))
    monitor = launchers.SweepMonitor(tmp_path, launchers.ended_here)
    for job, outcome in (("2", a), ("3", b), ("4", None)):
        returned(tmp_path, job, outcome)
    returned(tmp_path, "5", a, JobStatus.FAILED)
    monitor.poll()
    monitor.stop()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("ok    a\n", "error: b: no\n")
    assert monitor.outcomes == [a, b]


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
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.timeout_min) == (nodes, tasks, 1440)


def test_a_gpu_in_parts_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "GPU 0: H100 (UUID: GPU-1)\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\nGPU 1: H100 (UUID: GPU-2)\n"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launchers.shutil, "which", lambda name: name)
    monkeypatch.setattr(launchers.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=listed, returncode=0))
    assert launchers.visible_gpus() == ["0", "1"]
