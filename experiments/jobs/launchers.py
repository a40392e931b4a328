"""Jobs that a launcher starts in other processes: a slot on this machine for each, and the jobs that a command has run.

A slot is a file lock that lets a local job use one GPU, or one share of the CPU cores. Two sweeps on one machine share
the slots. Nothing here imports torch: jobs that wait cost a few megabytes each.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.errors import fail
from experiments.schema import CONF

SLOT_POLL_S = 0.2
GPUS_VARIABLE = "SHIRG_GPUS"
"""Names the GPUs of the process that started the job: submitit hides them from the jobs of this machine."""


@contextmanager
def acquire_slot(threads: int | None, device: str) -> Iterator[str | None]:
    """Waits for a free slot and holds it; a GPU's slot makes it the only one that the job sees.

    Jobs that were not started by the launcher `local` get None at once: SLURM or the user gave them their GPUs.

    Args:
        threads: CPU threads of the job; None is all cores.
        device: the config's: auto, cpu, or a CUDA device.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "local":
        yield None
        return
    gpus = [] if device == "cpu" else _names(os.environ.get(GPUS_VARIABLE, ""))
    cores = len(os.sched_getaffinity(0))
    names = [f"gpu-{gpu}" for gpu in gpus] or [f"cpu-{i}" for i in range(max(1, cores // (threads or cores)))]
    with _first_free(names) as name:
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[names.index(name)]
        yield name


def export_gpus() -> None:
    """Passes the names of the visible GPUs on to the jobs that this process starts."""
    os.environ[GPUS_VARIABLE] = ",".join(visible_gpus())


def visible_gpus() -> list[str]:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return _names(given)
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]  # parts of a GPU have lines too
    return [str(i) for i in range(len(gpus))] if listed.returncode == 0 else []


def _names(devices: str) -> list[str]:
    return [name.strip() for name in devices.split(",") if name.strip() not in ("", "-1")]


@contextmanager
def _first_free(names: list[str]) -> Iterator[str]:
    folder = Path(tempfile.gettempdir()) / f"shirg-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locks = {name: FileLock(folder / f"{name}.lock") for name in names}
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield name
            finally:
                lock.release()
            return
        time.sleep(SLOT_POLL_S)


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended; what its process returns to the one that started it."""

    folder: Path
    ok: bool
    line: str
    """The line that the job printed last."""
    skipped: bool = False
    """Whether it was finished before."""

    def __float__(self) -> float:
        """The mean of the job's first metric, which a sweeper that searches, such as optuna, asks each job for.

        Raises:
            ValueError: the job has no score.
        """
        from experiments.jobs.results import read_result

        result = read_result(self.folder) if self.ok else None
        quality = (result or {}).get("quality")
        if not quality:
            raise ValueError(f"{self.folder.name} has no score")
        return float(quality["metrics"][quality["metric"]]["mean"])


@dataclass
class Session:
    """The jobs of one command: those that ran in its own process and those that a launcher started."""

    outcomes: dict[Path, bool] = field(default_factory=dict)
    skipped: int = 0
    """Jobs that were finished before."""
    died: int = 0
    """Jobs whose process ended without a result."""

    def add(self, outcome: JobOutcome) -> None:
        self.outcomes[outcome.folder] = outcome.ok
        self.skipped += outcome.skipped


_session: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def session() -> Iterator[Session]:
    """Collects the outcomes of all jobs that end inside the block."""
    current = Session()
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)


def current_session() -> Session:
    """The session of this command; one that nobody reads outside a command."""
    return _session.get() or Session()


class SweepCallback(Callback):
    """Hydra's callback: notes the jobs of this process, and prepares those of a launcher.

    Launchers pickle it, so it has no attributes.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if (outcome := outcome_of(job_return)) is not None:
            current_session().add(outcome)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            _check_search(config)
        if config.hydra.launcher._target_.endswith(".BasicLauncher"):
            return
        # Jobs import the code that this process runs, whatever folder they start in and whatever is installed.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))
        # On a cluster without accounting, submitit warns each time it asks for its jobs.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "ERROR")
        export_gpus()


def _check_search(config: DictConfig) -> None:
    """Ends a sweep whose sweeper searches for what cannot be found, or must not be."""
    if config.hydra.job.name != "eval":
        fail("hydra/sweeper: a search needs a score, which eval.py gives; train with one value after the other")
    if config.data.get("split") == "test":
        fail("hydra/sweeper: a search would choose options on the test split; give data.split=val, and test the best")
    if config.hydra.sweeper.get("direction", "maximize") != "maximize":
        fail("hydra.sweeper.direction: scores are better when they are higher; give maximize")


def outcome_of(job_return: JobReturn) -> JobOutcome | None:
    """What `run_job` returned; None for a job that raised, and for the other ranks of one that shares its work."""
    found = job_return.return_value if job_return.status == JobStatus.COMPLETED else None
    return found if isinstance(found, JobOutcome) else None
