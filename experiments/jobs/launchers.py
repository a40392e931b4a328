"""Jobs that a launcher starts in other processes: a slot on this machine for each, and their status as they finish.

A slot is a file lock that lets a local job use one GPU, or one share of the CPU cores. Two sweeps on one machine share
the slots. Nothing here imports torch: jobs that wait cost a few megabytes each.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

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


_SUBMITTED = ".submitit/*/*_submitted.pkl"
_RETURNED = ".submitit/*/*_0_result.pkl"
POLL_S = 0.5
QUEUE_S = 20.0
"""Seconds between two calls of squeue, which loads the cluster's controller."""
_OVER = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())

Ended = Callable[[Sequence[str]], Mapping[str, str] | None]
"""Those of the jobs that have ended, and how; None when that cannot be found out now."""


class AllJobsEnded(BaseException):
    """All jobs have ended, and the launcher still waits for one. Not an Exception: submitit ignores those."""


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended; what its process returns to the one that started it."""

    folder: Path
    ok: bool
    line: str
    """The line that the job printed last."""


@dataclass
class Session:
    """The jobs of one command: those that ran in its own process and those that a launcher started."""

    outcomes: dict[Path, bool] = field(default_factory=dict)
    died: int = 0
    """Jobs whose process ended without a result."""
    monitor: "SweepMonitor | None" = None

    def add(self, outcome: JobOutcome) -> None:
        self.outcomes[outcome.folder] = outcome.ok

    def wait(self) -> None:
        """Waits until every job of the running sweep has ended."""
        if self.monitor is not None:
            self.monitor.wait()

    def stop_monitor(self) -> int:
        """Ends the monitoring of a sweep and counts its jobs; returns how many died."""
        if self.monitor is None:
            return 0
        monitor, self.monitor = self.monitor, None
        monitor.stop()
        for outcome in monitor.outcomes:
            self.add(outcome)
        self.died += len(monitor.dead)
        return len(monitor.dead)


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


class SweepCallback(Callback):
    """Hydra's callback: notes the jobs of this process, and monitors those of a launcher.

    Launchers pickle it, so it has no attributes.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        current, outcome = _session.get(), outcome_of(job_return)
        if current is not None and outcome is not None:
            current.add(outcome)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        launcher = config.hydra.launcher._target_.rpartition(".")[2]
        current = _session.get()
        if launcher == "BasicLauncher" or current is None:
            return
        # Jobs import the code that this process runs, whatever folder they start in and whatever is installed.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))
        # On a cluster without accounting, submitit warns each time it asks for its jobs.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "ERROR")
        study = Path(config.hydra.sweep.dir).absolute()
        if launcher == "SlurmLauncher":
            current.monitor = SweepMonitor(study, ended_in_slurm, queue_s=QUEUE_S, may_abandon=True)
        else:
            export_gpus()
            current.monitor = SweepMonitor(study, ended_here)


class SweepMonitor:
    """Prints the status of a sweep's jobs as they finish, and which of them died, until it is stopped.

    Args:
        study: folder of the study.
        ended: finds out which jobs have ended.
        queue_s: seconds between two calls of `ended`.
        may_abandon: interrupt the launcher when no job is left. Without accounting, SLURM cannot tell submitit that a
            job was killed, and submitit waits for ever. Needs to be made in the main thread.
    """

    def __init__(self, study: Path, ended: Ended, queue_s: float = POLL_S, may_abandon: bool = False) -> None:
        self.study = study
        self.outcomes: list[JobOutcome] = []
        self.dead: set[str] = set()
        self._ended, self._queue_s, self._may_abandon = ended, queue_s, may_abandon
        self._waits = False
        self._asked = time.monotonic()
        self._over: set[str] = set()
        # A launcher uses the same ids again: those of processes repeat after a restart of the machine.
        self._before = dict(self._files(_SUBMITTED)) | dict(self._files(_RETURNED))
        self._returned: set[Path] = set()
        self._all_over = threading.Event()
        self._stop = threading.Event()
        if may_abandon:
            signal.signal(signal.SIGUSR1, self._interrupt)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Polls a last time and ends the thread."""
        self._stop.set()
        self._thread.join()

    def wait(self) -> None:
        """Waits until every job has ended."""
        self._waits = True
        self._all_over.clear()
        self._all_over.wait()

    def poll(self) -> bool:
        """Prints the jobs that have finished since the last call; True when a look at the queue finds none left."""
        self._read_results()
        if time.monotonic() - self._asked < self._queue_s:
            return False
        nothing_left = self._find_dead()
        self._asked = time.monotonic()
        if nothing_left:
            self._read_results()
        return nothing_left

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_S):
                if self.poll():
                    self._all_over.set()
                    if self._may_abandon:
                        # Not SIGINT: a shell starts its background commands with that ignored.
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            self._read_results()
        finally:
            self._all_over.set()

    def _interrupt(self, _: int, __: FrameType | None) -> None:
        if not self._waits:
            raise AllJobsEnded

    def _find_dead(self) -> bool:
        """Prints which jobs ended without a result; True when all have ended.

        A job counts as ended at the second call that finds it so: its files may appear after its process is gone.
        """
        jobs = {path.parent.name: path for path in self._new(_SUBMITTED)}
        ended = self._ended(sorted(jobs)) if jobs else None
        if ended is None:
            return False
        over, self._over = self._over & set(ended), set(ended)
        returned = {path.parent.name for path in self._new(_RETURNED)}
        for job in sorted(over - returned - self.dead):
            self.dead.add(job)
            log = jobs[job].with_name(f"{job}_0_log.err")
            print(
                f"error: {_submitted_overrides(jobs[job])}: died without reporting a result ({ended[job]}): "
                f"cancelled, killed, or its machine was lost; see {log}",
                file=sys.stderr,
                flush=True,
            )
        return over == set(jobs)

    def _read_results(self) -> None:
        for path in self._new(_RETURNED):
            if path in self._returned:
                continue
            self._returned.add(path)
            outcome = _read_outcome(path)
            if outcome is not None:
                self.outcomes.append(outcome)
                print(outcome.line, file=sys.stdout if outcome.ok else sys.stderr, flush=True)

    def _new(self, pattern: str) -> Iterator[Path]:
        """Files that have changed since the sweep began."""
        return (path for path, changed in self._files(pattern) if self._before.get(path) != changed)

    def _files(self, pattern: str) -> Iterator[tuple[Path, int]]:
        """Files, and when each was changed, in nanoseconds."""
        return ((path, path.stat().st_mtime_ns) for path in sorted(self.study.glob(pattern)))


def outcome_of(job_return: JobReturn) -> JobOutcome | None:
    """What `run_job` returned; None for a job that raised, and for the other ranks of one that shares its work."""
    found = job_return.return_value if job_return.status == JobStatus.COMPLETED else None
    return found if isinstance(found, JobOutcome) else None


def _read_outcome(path: Path) -> JobOutcome | None:
    """The outcome in submitit's result file; None when the job raised, which the launcher reports itself."""
    with open(path, "rb") as file:
        state, result = pickle.load(file)
    return outcome_of(result) if state == "success" else None


def ended_in_slurm(jobs: Sequence[str]) -> dict[str, str] | None:
    """SLURM's state of each job that has ended; None when squeue fails. SLURM forgets ended jobs after some minutes."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        queue = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # squeue fails for jobs that SLURM has forgotten, and also while SLURM cannot be reached.
    if queue.returncode != 0 and "Invalid job id" not in queue.stderr:
        return None
    states = dict(line.split() for line in queue.stdout.splitlines())
    return {job: states.get(job, "no longer in the queue") for job in jobs if states.get(job, "COMPLETED") in _OVER}


def ended_here(jobs: Sequence[str]) -> dict[str, str]:
    """The same for child processes of this one; they are not reaped, the launcher does that."""
    return {job: "its process is gone" for job in jobs if _is_over(int(job))}


def _is_over(process: int) -> bool:
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _submitted_overrides(submitted: Path) -> str:
    """The overrides of a submitted job."""
    from submitit.core.utils import DelayedSubmission

    return " ".join(DelayedSubmission.load(submitted).args[0])
