"""A job: one folder, one lock, one result.json whose status is running, then ok, failed or oom.

A finished job is skipped. A stopped one goes on where it stopped with resume=true, and is refused without it. A config
that has changed is refused, because the folder holds the work of another experiment. What is refused before it answers
or trains leaves no record: it is no result.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import profiling
from experiments.atomic_files import clear_temporaries, remove_path, write_atomic
from experiments.errors import RESUME, explain, sentence_of, visible
from experiments.jobs import results
from experiments.jobs.answer_journal import JOURNAL, OLD_JOURNAL, AnswerJournal
from experiments.jobs.distributed import Ranks, init_distributed, is_requeued
from experiments.jobs.launchers import JobOutcome
from experiments.jobs.results import adapter_path
from experiments.override_grammar import command_line
from experiments.torch_trace import MEMORY, TRACE
from shirg import UserError

CHECKPOINT = "checkpoints/last.ckpt"
ERROR = "error.txt"
_OWNED = (results.RESULT, results.SAMPLES, JOURNAL, OLD_JOURNAL, ERROR, results.SHOTS, TRACE, MEMORY)


@dataclass
class Job:
    """The run that a command works for."""

    folder: Path
    identity: results.Identity
    ranks: Ranks
    """The processes that work together; only the main one writes into the folder."""
    begun: bool = False
    """Whether the job answers or trains: from then on its end is recorded, however it ends."""

    def begin(self) -> None:
        """Called when everything that a user can do wrong on the command line has been checked."""
        self.begun = True

    def journal(self) -> AnswerJournal:
        return AnswerJournal(self.folder)


Work = Callable[[DictConfig, Job], Mapping[str, Any]]
"""A command: does the work and returns the sections of result.json."""
OnEnd = Callable[[Path], None]
"""Called with the study's folder after each of its jobs."""
Check = Callable[[DictConfig, Path], str]
"""Called with the folder of a finished job before it is skipped: raises UserError where the job has become another one,
and returns what else the line must say."""


class Refused(UserError):
    """The job must not run now; the message says what to do."""


def run_job(cfg: DictConfig, work: Work, on_end: OnEnd | None = None, check: Check | None = None) -> JobOutcome | None:
    """Runs a command as a job. None for the other ranks of a job that several processes share, unless they failed.

    The main rank decides whether the job runs, and keeps its record; the others only work.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if is_requeued():
        cfg.resume, cfg.overwrite = True, False
    try:
        ranks = init_distributed(cfg)
        if not ranks.is_main:
            return _follow(cfg, work, folder, ranks)
        with ExitStack() as held:
            identity = None
            try:
                held.enter_context(FileLock(folder / results.LOCK, timeout=0))
                identity = _claim(cfg, folder)
            finally:
                ranks.broadcast(identity is not None)
            for place in (folder, folder / results.SHOTS):
                clear_temporaries(place)
            if identity is None:
                _clear(folder)  # what is left of a process that was killed between the record and this
                return _skip(folder, on_end, check(cfg, folder) if check is not None else "")
            return _carry_out(cfg, work, Job(folder, identity, ranks), on_end)
    except Timeout:
        return _failed(folder, "another process is running this job; wait for it, or give another study=")
    except Exception as error:
        if (sentence := sentence_of(error, RESUME, folder)) is None:
            raise
        return _failed(folder, sentence)


def _claim(cfg: DictConfig, folder: Path) -> results.Identity | None:
    """Which job this is; None when it is finished already. Raises Refused when it must not run."""
    try:
        identity = _identify(cfg, folder)
    except OmegaConfBaseException as error:
        raise Refused(explain(error, HydraConfig.get().job.name, [])) from None
    return identity if _admit(cfg, folder, identity) else None


def _skip(folder: Path, on_end: OnEnd | None, remark: str) -> JobOutcome:
    line = "; ".join(filter(None, (f"skip  {folder.name}: finished already", remark)))
    outcome = _print(JobOutcome(folder, True, line, skipped=True))
    if on_end is not None:
        on_end(folder.parent)
    return outcome


def _carry_out(cfg: DictConfig, work: Work, job: Job, on_end: OnEnd | None) -> JobOutcome:
    folder, identity = job.folder, job.identity
    began = time.perf_counter()
    before = (folder / results.RESULT).read_bytes() if (folder / results.RESULT).exists() else None
    times: dict[str, Any] = {"started": results.now()}
    results.write_result(folder, identity, "running", {"times": times})
    status: results.Status = "ok"
    reason = trace = None
    sections: Mapping[str, Any] = {}
    try:
        sections = work(cfg, job)
    except Exception as error:
        status, reason, trace = _reason(error, folder)
        if not job.begun and sentence_of(error, RESUME, folder) is not None:
            _withdraw(folder, before)
            return _failed(folder, reason)
    if status == "oom":
        profiling.release()  # the exception, and with it the frames that held the memory, is gone here
    seconds = time.perf_counter() - began
    times = {**times, **sections.get("times", {}), "finished": results.now(), "wall_s": seconds}
    outcome = None
    try:
        if trace is not None:
            write_atomic(folder / ERROR, trace)
        results.write_result(folder, identity, status, {**sections, "times": times}, reason)
        if status == "ok":
            _clear(folder)
            remove_path(folder / ERROR)
            outcome = _print(JobOutcome(folder, True, f"ok    {identity.job}: {seconds:.1f} s"))
        if on_end is not None:
            on_end(folder.parent)
    except OSError as error:
        if status == "ok":
            raise
        # What stopped the job, a full disk for example, also prevents its record from being written.
        reason = f"{reason}; the job's record could not be written either ({error.strerror or error})"
    return outcome or _failed(folder, reason or status)


def _clear(folder: Path) -> None:
    """Removes what a stopped job would go on from, once its record is written: not before, or a kill loses the work."""
    remove_path(folder / JOURNAL)
    remove_path((folder / CHECKPOINT).parent)


def _withdraw(folder: Path, before: bytes | None) -> None:
    """Leaves the folder as it was before the job, of which `before` was the record; a new one is removed."""
    if before is not None:
        write_atomic(folder / results.RESULT, before)
        return
    remove_path(folder / results.RESULT)
    if {path.name for path in folder.iterdir()} <= {results.LOCK}:
        remove_path(folder / results.LOCK)
        folder.rmdir()


def _reason(error: Exception, folder: Path) -> tuple[results.Status, str, str | None]:
    """Status, reason and traceback for the record of a job that raised; a bug's traceback is printed as well."""
    if profiling.is_out_of_memory(error):
        explained = isinstance(error, profiling.OutOfMemory)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return "oom", str(error) if explained else f"out of memory ({first_line}): lower batch_size= or budget=", None
    if (sentence := sentence_of(error, RESUME, folder)) is not None:
        return "failed", sentence, traceback.format_exc()
    traceback.print_exc()
    return "failed", f"{type(error).__name__}: {error}", traceback.format_exc()


def _follow(cfg: DictConfig, work: Work, folder: Path, ranks: Ranks) -> JobOutcome | None:
    """The part of a rank that is not the main one: the work, if the main rank says so, and a line when it fails."""
    if not ranks.broadcast(False):
        return None
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            work(cfg, Job(folder, _identify(cfg, folder), ranks))
    except Exception as error:
        if (sentence := sentence_of(error, RESUME, folder)) is None:
            raise
        return _print(JobOutcome(folder, False, f"error: process {ranks.rank}: {' '.join(sentence.split())}"))
    return None


def _identify(cfg: DictConfig, folder: Path) -> results.Identity:
    hydra = HydraConfig.get()
    config = results.resolve_config(cfg)
    adapter = adapter_path(config.get("adapter"), config["model"], hydra.runtime.choices["selector"])
    config["stored"] = {
        "model": results.files_digest(config["model"].get("path")),
        "adapter": results.files_digest(adapter),
    }
    # What a job trains is none of its inputs, and lies where it would be found afterwards.
    if hydra.runtime.choices["relevance"] == "learned" and config.get("stage") != "gate":
        head = results.head_folder(config["relevance"].get("path"), adapter, config["model"])
        config["stored"]["relevance"] = results.files_digest(None if head is None else str(head))
    overrides = [str(o) for o in hydra.overrides.task if str(o).partition("=")[0] not in results.SESSION]
    return results.Identity(
        version=results.VERSION,
        verb=hydra.job.name,
        study=folder.parent.name,
        job=folder.name,
        command=command_line(hydra.job.name, overrides),
        overrides=overrides,
        choices={k: str(v) for k, v in hydra.runtime.choices.items() if "/" not in k and "@" not in k},
        config_hash=results.config_hash(config),
        config=config,
    )


def _admit(cfg: DictConfig, folder: Path, identity: results.Identity) -> bool:
    """True to run, False to skip; raises Refused when the folder holds something that must not be touched."""
    if cfg.resume and cfg.overwrite:
        raise Refused("resume=true keeps what is there and overwrite=true discards it: give one of them")
    if cfg.overwrite:
        for name in _OWNED:
            remove_path(folder / name)
        return True
    before = results.read_result(folder)
    traces = [folder / name for name in (JOURNAL, OLD_JOURNAL, CHECKPOINT)]
    started = any(trace.exists() and trace.stat().st_size for trace in traces)
    if before is None or not (before["status"] == "ok" or started):
        return True
    # A key that did not exist then, and is null now, makes another digest and no other job.
    keys = results.changed_keys(before["config"], identity.config)
    if before["config_hash"] != identity.config_hash and keys:
        shown = ", ".join(keys[:6])
        raise Refused(
            f"{_short(folder)} was run with another config (different now: {shown}); overwrite=true starts again, "
            "another study= keeps both"
        )
    if before["status"] == "ok":
        return False
    if not cfg.resume:
        raise Refused(
            f"{_short(folder)} was stopped in the middle: resume=true keeps what it has, overwrite=true starts again"
        )
    return True


def _print(outcome: JobOutcome) -> JobOutcome:
    """Prints the job's last line; a launcher writes it to the job's log, and the process that waits prints it again."""
    sys.stdout.flush()
    print(outcome.line, file=sys.stdout if outcome.ok else sys.stderr, flush=True)
    return outcome


def _failed(folder: Path, sentence: str) -> JobOutcome:
    where = f"{folder.name}: " if HydraConfig.get().mode == RunMode.MULTIRUN else ""
    return _print(JobOutcome(folder, False, visible(f"error: {where}{' '.join(sentence.split())}")))


def _short(folder: Path) -> str:
    return str(Path(*folder.parts[-3:]))
