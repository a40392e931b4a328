"""A job's life: one folder, one lock, one result.json that says running, then ok, failed or oom.

A finished job is skipped with resume=true, a stopped one goes on where it stopped, and neither is touched without
being told to. A config that changed since is refused, because its folder holds the work of another experiment.
"""

import os
import shlex
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

from experiments import cli, profiling
from experiments.build import adapter_path
from experiments.errors import is_user_error
from experiments.jobs import launchers, results
from experiments.jobs.atomic_files import Journal, remove_path, write_atomic
from experiments.jobs.distributed import Ranks, init_distributed, is_requeued
from shirg import UserError

JOURNAL = "journal.jsonl"
CHECKPOINT = "checkpoints/last.ckpt"
ERROR = "error.txt"
SHOTS = "shots"
_OWNED = (results.RESULT, results.SAMPLES, JOURNAL, ERROR, SHOTS)


@dataclass(frozen=True)
class Job:
    """What a verb may know about the run it belongs to."""

    folder: Path
    identity: results.Identity
    crew: Ranks
    """The processes that do it together; the first one alone writes into the folder."""

    def journal(self) -> Journal:
        return Journal(self.folder / JOURNAL)


Work = Callable[[DictConfig, Job], Mapping[str, Any]]
"""A verb: does the work and returns the sections of result.json."""


class Refused(UserError):
    """The job must not run now; the message says what to do."""


def run_job(cfg: DictConfig, work: Work) -> bool:
    """Runs a verb as a job and keeps its study's table and report fresh; False when it failed or was refused.

    Of several processes the first decides whether the job runs, and keeps its record; the others only work.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    ok = False
    if is_requeued():
        cfg.resume, cfg.overwrite = True, False
    try:
        crew = init_distributed(cfg)
        if not crew.first:
            return _follow(cfg, work, folder, crew)
        with ExitStack() as held:
            identity = None
            try:
                held.enter_context(FileLock(folder / results.LOCK, timeout=0))
                identity = _claim(cfg, folder)
            finally:
                crew.hear(identity is not None)
            ok = identity is None or _carry_out(cfg, work, Job(folder, identity, crew))
    except Timeout:
        _say(folder, "another process is running this job; wait for it, or give another study=")
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        _say(folder, str(error))
    cli.finished(folder, ok)
    if not ok and launchers.is_launched():
        # All that comes back to the process that waits is this; the sentence has been said.
        raise cli.JobFailed(str(folder))
    return ok


def _claim(cfg: DictConfig, folder: Path) -> results.Identity | None:
    """Which job this is; None when it is finished already. Raises Refused when it must not run."""
    try:
        identity = _identify(cfg, folder)
    except OmegaConfBaseException as error:
        raise Refused(cli.explain(error, HydraConfig.get().job.name, [])) from None
    if _admit(cfg, folder, identity):
        return identity
    _tell(folder, f"skip  {identity.job}: finished already")
    _refresh(folder.parent)
    return None


def _carry_out(cfg: DictConfig, work: Work, job: Job) -> bool:
    folder, identity = job.folder, job.identity
    began = time.perf_counter()
    times: dict[str, Any] = {"started": results.now()}
    results.write_result(folder, identity, "running", {"times": times})
    status: results.Status = "failed"
    reason = trace = None
    sections: Mapping[str, Any] = {}
    try:
        sections = work(cfg, job)
        status = "ok"
    except Exception as error:
        if profiling.is_out_of_memory(error):
            told = isinstance(error, profiling.OutOfMemory)
            detail = str(error) if told else f"out of memory ({_summary_line(error)}): lower batch_size= or budget="
            status, reason = "oom", detail
        else:
            reason = str(error) if is_user_error(error) else f"{type(error).__name__}: {error}"
            trace = traceback.format_exc()
            if not is_user_error(error):
                traceback.print_exc()
    if status == "oom":
        profiling.release()
    seconds = time.perf_counter() - began
    times = {**times, **sections.get("times", {}), "finished": results.now(), "wall_s": seconds}
    try:
        if trace is not None:
            write_atomic(folder / ERROR, trace)
        results.write_result(folder, identity, status, {**sections, "times": times}, reason)
        if status == "ok":
            remove_path(folder / JOURNAL)
            remove_path(folder / ERROR)
            _tell(folder, f"ok    {identity.job}: {seconds:.1f} s")
        _refresh(folder.parent)
    except OSError as error:
        if status == "ok":
            raise
        # What stopped the job, a full disk say, keeps us from writing that down.
        reason = f"{reason}; the job's record could not be written either ({error.strerror or error})"
    if status != "ok":
        _say(folder, reason or status)
    return status == "ok"


def _follow(cfg: DictConfig, work: Work, folder: Path, crew: Ranks) -> bool:
    """What a process does that is not the first: the work, if the first one says so, and a word when it fails."""
    if not crew.hear(False):
        return True
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            work(cfg, Job(folder, _identify(cfg, folder), crew))
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: process {crew.rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        cli.finished(folder, False)
        return False
    return True


def _summary_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _identify(cfg: DictConfig, folder: Path) -> results.Identity:
    hydra = HydraConfig.get()
    config = results.resolve_config(cfg)
    config["stored"] = {
        "model": results.files_digest(config["model"].get("path")),
        "adapter": results.files_digest(
            adapter_path(config.get("adapter"), config["model"], hydra.runtime.choices["selector"])
        ),
    }
    overrides = [str(o) for o in hydra.overrides.task if str(o).partition("=")[0] not in results.SESSION]
    return results.Identity(
        version=results.VERSION,
        verb=hydra.job.name,
        study=folder.parent.name,
        job=folder.name,
        command=shlex.join(["python", f"{hydra.job.name}.py", *overrides]),
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
    started = any((folder / trace).exists() and (folder / trace).stat().st_size for trace in (JOURNAL, CHECKPOINT))
    if before is None or not (before["status"] == "ok" or started):
        return True
    if before["config_hash"] != identity.config_hash:
        keys = ", ".join(results.changed_keys(before["config"], identity.config)[:6])
        raise Refused(
            f"{_short(folder)} was run with another config (different now: {keys}); overwrite=true starts again, "
            "another study= keeps both"
        )
    if not cfg.resume:
        state = "is finished" if before["status"] == "ok" else "was stopped in the middle"
        raise Refused(f"{_short(folder)} {state}: resume=true keeps what it has, overwrite=true starts again")
    return before["status"] != "ok"


def _refresh(study: Path) -> None:
    from experiments.analysis.table import refresh
    from experiments.report.page import write_report

    if rows := refresh(study):
        write_report(study, rows)


def _tell(folder: Path, line: str, ok: bool = True) -> None:
    sys.stdout.flush()
    print(line, file=sys.stdout if ok else sys.stderr, flush=True)
    if launchers.is_launched():
        launchers.report_status(folder, ok, line)


def _say(folder: Path, sentence: str) -> None:
    where = f"{folder.name}: " if HydraConfig.get().mode == RunMode.MULTIRUN else ""
    _tell(folder, f"error: {where}{' '.join(sentence.split())}", ok=False)


def _short(folder: Path) -> str:
    return str(Path(*folder.parts[-3:]))
