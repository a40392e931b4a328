"""Jobs that submitit has started: on this machine or on SLURM. Waits for them, and prints how each ended as it ends.

submitit itself waits for the first job, then for the second, gives up at the first that died, and without accounting
never learns that SLURM has ended a job. Here the news of a job is its result file, which submitit reads, and where it
has none, what the system says about its process or its place in the queue.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from omegaconf import OmegaConf

from experiments.errors import Terminated, raise_terminated
from experiments.jobs.launchers import current_session, outcome_of

if TYPE_CHECKING:
    from submitit import Job

POLL_S = 0.5
QUEUE_S = 20.0
"""Seconds between two calls of squeue, which loads the cluster's controller."""
STOP_S = 20.0
"""Seconds in which an interrupted job of this machine should stop: it finishes the operation that it is in."""
_OVER = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())

Ended = Callable[[Sequence["Job[JobReturn]"]], Mapping[str, str] | None]
"""Those of the jobs that have ended, by id, and how; None when that cannot be found out now."""


def on_this_machine(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Starts the jobs as processes of this machine; an interrupted command stops them."""
    folder = Path(launcher.params["submitit_folder"])
    host = socket.gethostname()
    clear_folders(folder.parent, over_here(folder.parent, host))
    with _without_interrupts():
        jobs = _submit(launcher, "local", folder.with_name(f"{host}-%j"), job_overrides, first)
    waiting = SubmittedJobs(jobs, job_overrides, ended_here)
    try:
        return waiting.wait()
    except (KeyboardInterrupt, Terminated) as error:
        if left := stop(list(waiting.pending.values())):
            still = " ".join(sorted(job.job_id for job in left))
            raise type(error)(f"jobs in the middle of a batch stop after it (processes {still})") from None
        raise


def on_slurm(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Submits the jobs to SLURM, as one array; they outlive an interrupted command."""
    folder = Path(launcher.params["submitit_folder"])
    clear_folders(folder.parent, over_in_slurm(folder.parent))
    jobs = _submit(launcher, "slurm", folder, job_overrides, first)
    waiting = SubmittedJobs(jobs, job_overrides, ended_in_slurm, QUEUE_S)
    try:
        return waiting.wait()
    except (KeyboardInterrupt, Terminated) as error:
        if not waiting.pending:
            raise
        arrays = " ".join(sorted({job.partition("_")[0] for job in waiting.pending}))
        what = "1 job goes" if len(waiting.pending) == 1 else f"{len(waiting.pending)} jobs go"
        raise type(error)(f"{what} on in SLURM, `scancel {arrays}` ends them") from None


def until_terminated(job: Callable[..., JobReturn], *words: object) -> JobReturn:
    """Runs a job that SIGTERM stops: submitit ignores it, because clusters send it to jobs that go on elsewhere."""
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        return job(*words)
    except Terminated:
        sys.exit(128 + signal.SIGTERM)


def _submit(
    launcher: Any, cluster: str, folder: Path, job_overrides: Sequence[Sequence[str]], first: int
) -> list["Job[JobReturn]"]:
    """Submits the launcher, which is called in each job; its options are submitit's."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    options = {key: value for key, value in launcher.params.items() if key != "submitit_folder"}
    limits = {f"{cluster}_{key}": options.pop(key) for key in ["max_num_timeout"] if key in options}
    executor = submitit.AutoExecutor(folder, cluster=cluster, **limits)
    shared = OmegaConf.structured(BaseQueueConf).keys()
    executor.update_parameters(
        **{key if key in shared else f"{cluster}_{key}": value for key, value in options.items()}
    )
    numbers = range(first, first + len(job_overrides))
    return executor.map_array(
        launcher,
        [list(overrides) for overrides in job_overrides],
        ["hydra.sweep.dir"] * len(numbers),
        numbers,
        [f"job_id_for_{number}" for number in numbers],
        [Singleton.get_state()] * len(numbers),
    )


class SubmittedJobs:
    """The jobs of a sweep until all have ended.

    Args:
        jobs: as submitit returns them.
        job_overrides: the words of each.
        ended: finds out which jobs have ended.
        queue_s: seconds between two calls of `ended`.
    """

    def __init__(
        self,
        jobs: Sequence["Job[JobReturn]"],
        job_overrides: Sequence[Sequence[str]],
        ended: Ended,
        queue_s: float = POLL_S,
    ) -> None:
        self.pending = {job.job_id: job for job in jobs}
        self._words = {
            job.job_id: " ".join(filter_overrides(words)) for job, words in zip(jobs, job_overrides, strict=True)
        }
        self._ended, self._queue_s = ended, queue_s
        self._session = current_session()
        self._asked = time.monotonic()
        self._over: set[str] = set()

    def wait(self) -> list[JobReturn]:
        """What the jobs returned, those that died left out; Hydra raises the errors that are in it."""
        returned = []
        while self.pending:
            returned += self.poll()
            if self.pending:
                time.sleep(POLL_S)
        return returned

    def poll(self) -> list[JobReturn]:
        """Reads and prints the results that are there, and says which jobs ended without one."""
        returned = self._read_results()
        if self.pending and time.monotonic() - self._asked >= self._queue_s:
            self._find_dead()
            self._asked = time.monotonic()
        return returned

    def _read_results(self) -> list[JobReturn]:
        from submitit.core.utils import FailedJobError

        returned = []
        for name, job in list(self.pending.items()):
            main = job.task(0)
            if not (main.paths.result_pickle.exists() and main.done()):
                continue
            del self.pending[name]
            try:
                result = main.result()
            except FailedJobError as error:
                self._session.died += 1
                _say(f"error: a job could not start: {_last_line_of_trace(error)}", ok=False)
                continue
            returned.append(result)
            if (outcome := outcome_of(result)) is not None:
                self._session.add(outcome)
                _say(outcome.line, ok=outcome.ok)
        return returned

    def _find_dead(self) -> None:
        """Says which jobs ended without a result.

        A job counts as ended at the second call that finds it so: its files may appear after its process is gone.
        """
        ended = self._ended(list(self.pending.values()))
        if ended is None:
            return
        dead, self._over = self._over & set(ended), set(ended)
        for name in sorted(dead):
            log = self.pending.pop(name).paths.stderr
            self._session.died += 1
            _say(
                f"error: {self._words[name]}: died without reporting a result ({ended[name]}): cancelled, killed, or "
                f"its machine was lost; see {log}",
                ok=False,
            )


def _say(line: str, *, ok: bool) -> None:
    print(line, file=sys.stdout if ok else sys.stderr, flush=True)


def _last_line_of_trace(error: Exception) -> str:
    trace = re.split(r"-{20,}", str(error))[1]  # it is between two dashed lines
    return trace.strip().splitlines()[-1]


def ended_in_slurm(jobs: Sequence["Job[JobReturn]"]) -> dict[str, str] | None:
    return states_in_slurm([job.job_id for job in jobs])


def states_in_slurm(jobs: Sequence[str]) -> dict[str, str] | None:
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


def ended_here(jobs: Sequence["Job[JobReturn]"]) -> dict[str, str]:
    """The same for processes of this machine."""
    return {job.job_id: "its process is gone" for job in jobs if job.done()}


def stop(jobs: Sequence["Job[JobReturn]"]) -> list["Job[JobReturn]"]:
    """Stops jobs of this machine; returns those that have not stopped in time. A job loses the batch that it is in."""
    deadline = time.monotonic() + STOP_S
    while (left := [job for job in jobs if not job.done()]) and time.monotonic() < deadline:
        for job in left:  # again and again: submitit's process passes it on only once it has started the job
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
        time.sleep(POLL_S)
    return left


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started here never see Ctrl+C, which a terminal sends to all: the waiting command stops them.

    Otherwise each of submitit's processes would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def clear_folders(folder: Path, names: Sequence[str]) -> None:
    """Removes what submitit left of jobs that have ended: pickled configs, logs."""
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)


def over_here(folder: Path, host: str) -> list[str]:
    """Folders of jobs of this machine whose process is gone."""
    jobs = {path.name: path.name.removeprefix(f"{host}-") for path in folder.glob(f"{host}-*")}
    return [name for name, process in jobs.items() if not (process.isdecimal() and runs(int(process)))]


def runs(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


def over_in_slurm(folder: Path) -> list[str]:
    """Folders of jobs that SLURM has ended, and those of arrays without any other."""
    there = [path.name for path in folder.glob("*") if re.fullmatch(r"\d+(_\d+)?", path.name)]
    jobs = [name for name in there if "_" in name]
    over = (states_in_slurm(jobs) or {}) if jobs else {}
    alive = {name.partition("_")[0] for name in jobs if name not in over}
    return [*over, *(name for name in there if "_" not in name and name not in alive)]
