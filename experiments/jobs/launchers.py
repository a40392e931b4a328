"""Turns for jobs that a launcher starts all at once on one machine: one job on each GPU, or on each share of the cores.

Locks are files, so that two sweeps on one machine take turns as well. Nothing here imports torch: jobs that wait cost
a few megabytes each.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.jobs.atomic_files import read_json, write_atomic
from experiments.schema import CONF

SLOT_POLL_S = 0.2
GPUS_VARIABLE = "SHIRG_GPUS"
"""Where a job finds the GPUs of the process that started it: submitit hides them from the jobs of this machine."""


@contextmanager
def acquire_slot(threads: int | None, device: str) -> Iterator[str | None]:
    """Waits for a free slot and holds it; a GPU's slot makes it the only one that the job sees.

    Jobs that do not come from the launcher `local` have the machine's other users to ask, not us: they go on at once.

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
    """Tells the jobs that this process is about to start which GPUs they may take turns on."""
    os.environ[GPUS_VARIABLE] = ",".join(visible_gpus())


def visible_gpus() -> list[str]:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return _names(told)
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    return [str(i) for i in range(len(listed.stdout.splitlines()))] if listed.returncode == 0 else []


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


STATUS_FILE = ".said"
_SUBMITTED = ".submitit/*/*_submitted.pkl"
_RETURNED = ".submitit/*/*_0_result.pkl"
POLL_S = 0.5
QUEUE_S = 20.0
"""Between two looks at SLURM's queue, which many wait for."""
_OVER = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())

Ended = Callable[[Sequence[str]], Mapping[str, str] | None]
"""Those of the jobs that have ended, and how; None when nobody can tell now."""
_listeners: list["SweepMonitor"] = []


class AllJobsEnded(BaseException):
    """All jobs have ended, and the launcher still waits for one. No Exception: submitit passes over those."""


def is_launched() -> bool:
    """Whether this process is a job that a launcher started."""
    return "SUBMITIT_EXECUTOR" in os.environ


def report_status(folder: Path, ok: bool, line: str) -> None:
    """Leaves the job's last line where the waiting process looks."""
    write_atomic(folder / STATUS_FILE, json.dumps({"ok": ok, "line": line}))


class SweepCallback(Callback):
    """Hydra's callback: listens during a sweep whose jobs run elsewhere. Launchers pickle it, so it holds nothing."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        launcher = config.hydra.launcher._target_.rpartition(".")[2]
        if launcher == "BasicLauncher":
            return
        # Jobs import the code that this process runs, whatever folder they start in and whatever is installed.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))
        # On a cluster without accounting, submitit warns at every look at its jobs.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "ERROR")
        study = Path(config.hydra.sweep.dir).absolute()
        if launcher == "SlurmLauncher":
            signal.signal(signal.SIGUSR1, _abandon)
            _listeners.append(SweepMonitor(study, ended_in_slurm, every_s=QUEUE_S, may_abandon=True))
        else:
            export_gpus()
            _listeners.append(SweepMonitor(study, ended_here))


class SweepMonitor:
    """Prints what the jobs of a study say, and which of them died, from now on until it is stopped.

    Args:
        study: folder of the study.
        ended: whom to ask about jobs.
        every_s: seconds between two questions.
        may_abandon: end the launcher's waiting when no job is left. Without accounting, SLURM cannot tell submitit that
            a job was killed, and submitit waits for ever.
    """

    def __init__(self, study: Path, ended: Ended, every_s: float = POLL_S, may_abandon: bool = False) -> None:
        self.study = study
        self.heard: dict[Path, bool] = {}
        self.dead: set[str] = set()
        self.patient = False
        self._ended, self._every_s, self._may_abandon = ended, every_s, may_abandon
        self._asked = time.monotonic()
        self._over: set[str] = set()
        # A launcher's ids come again: those of processes do so after a restart of the machine.
        self._seen = {
            path: changed for of in (f"*/{STATUS_FILE}", _SUBMITTED, _RETURNED) for path, changed in self._files(of)
        }
        self._all_over = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self) -> None:
        """Until every job has ended."""
        self.patient = True
        self._all_over.clear()
        self._all_over.wait()

    def _listen(self) -> None:
        try:
            while not self._stop.wait(POLL_S):
                self._hear()
                if time.monotonic() - self._asked >= self._every_s:
                    self._ask()
            self._hear()
        finally:
            self._all_over.set()

    def _ask(self) -> None:
        nothing_left = self._look()
        self._asked = time.monotonic()
        if nothing_left:
            self._hear()
            self._all_over.set()
            if self._may_abandon:
                # Not an interrupt: a command in a shell's background ignores those.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _look(self) -> bool:
        """Names the jobs that died; True when all have ended.

        Twice in a row, because a file that a job leaves may come later than the news of its end.
        """
        jobs = {path.parent.name: path for path, _ in self._new(_SUBMITTED)}
        ended = self._ended(sorted(jobs)) if jobs else None
        if ended is None:
            return False
        over, self._over = self._over & set(ended), set(ended)
        returned = {path.parent.name for path, _ in self._new(_RETURNED)}
        for job in sorted(over - returned - self.dead):
            self.dead.add(job)
            log = jobs[job].with_name(f"{job}_0_log.err")
            print(
                f"error: {_submitted_overrides(jobs[job])}: ended without a word ({ended[job]}): cancelled, killed, or "
                f"its machine was lost; see {log}",
                file=sys.stderr,
                flush=True,
            )
        return over == set(jobs)

    def _hear(self) -> None:
        for path, changed in self._new(f"*/{STATUS_FILE}"):
            self._seen[path] = changed
            said = read_json(path)
            if said is not None:
                self.heard[path.parent] = said["ok"]
                print(said["line"], file=sys.stdout if said["ok"] else sys.stderr, flush=True)

    def _new(self, pattern: str) -> Iterator[tuple[Path, int]]:
        return ((path, changed) for path, changed in self._files(pattern) if self._seen.get(path) != changed)

    def _files(self, pattern: str) -> Iterator[tuple[Path, int]]:
        """Files, and when each was changed."""
        return ((path, path.stat().st_mtime_ns) for path in sorted(self.study.glob(pattern)))


def ended_in_slurm(jobs: Sequence[str]) -> dict[str, str] | None:
    """SLURM's word for how each of the ended jobs ended; it forgets them after some minutes."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        queue = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Jobs that SLURM has forgotten are an error to squeue; so is SLURM's own absence, which may pass.
    if queue.returncode != 0 and "Invalid job id" not in queue.stderr:
        return None
    states = dict(line.split() for line in queue.stdout.splitlines())
    return {job: states.get(job, "no longer in the queue") for job in jobs if states.get(job, "COMPLETED") in _OVER}


def ended_here(jobs: Sequence[str]) -> dict[str, str]:
    """The same of processes that this one started; none is reaped, since that is the launcher's part."""
    return {job: "its process is gone" for job in jobs if _is_over(int(job))}


def _is_over(process: int) -> bool:
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _submitted_overrides(submitted: Path) -> str:
    """What the launcher was to run."""
    from submitit.core.utils import DelayedSubmission

    return " ".join(DelayedSubmission.load(submitted).args[0])


def _abandon(*_: object) -> None:
    if not all(listener.patient for listener in _listeners):
        raise AllJobsEnded


def wait_all() -> None:
    """Until every job of the sweep has ended, whatever became of it."""
    for listener in _listeners:
        listener.wait()


def stop_all() -> tuple[dict[Path, bool], int]:
    """Ends the listening; the folders of jobs that were heard of with whether each went well, and how many died."""
    heard: dict[Path, bool] = {}
    died = 0
    while _listeners:
        listener = _listeners.pop()
        listener.stop()
        heard |= listener.heard
        died += len(listener.dead)
    return heard, died
