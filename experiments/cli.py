"""The outermost frame of the entry points: one clear sentence for bad input, a traceback for a bug, an exit code."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from experiments.errors import fail
from experiments.jobs import launchers
from experiments.schema import CONF, VERSION_BASE
from experiments.sweeps import expand

_jobs: list[tuple[Path, bool]] = []
_died = 0


class JobFailed(Exception):
    """A job in another process failed, and has said why."""


def finished(folder: Path, ok: bool) -> None:
    """Notes a job of this process; the tables of its study are printed when the last one is over."""
    _jobs.append((folder, ok))


def run(main: Callable[[], Any], verb: str) -> None:
    """Runs a Hydra main; exits with 1 and one sentence on bad input.

    With HYDRA_FULL_ERROR=1 in the environment every error keeps its traceback.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if verb == "eval" and any(word.startswith("rescore=") for word in sys.argv[1:]):
            _rescore(sys.argv[1:])
        else:
            for words in _command_lines(verb):
                sys.argv[1:] = words
                _call(main)
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        fail(explain(error, verb, sys.argv[1:]))
    except BrokenPipeError:
        # Whoever read our output has gone, as `| head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fail("interrupted; the same command with resume=true goes on from here", code=130)
    if any(ok for _, ok in _jobs):
        from experiments.analysis.table import print_table
        from experiments.report.publish import publish

        for study in dict.fromkeys(folder.parent for folder, _ in _jobs):
            publish(study)
            print_table(study)
    if _died:
        jobs = "a job" if _died == 1 else f"{_died} jobs"
        fail(f"{jobs} ended without a word; the same command with resume=true runs what is missing")
    if not all(ok for _, ok in _jobs):
        sys.exit(1)


def _call(main: Callable[[], Any]) -> None:
    """One command line; what its jobs said in other processes is heard to the end, also when one of them died."""
    global _died
    failed = 0
    try:
        main()
    except (JobFailed, launchers.AllJobsEnded):
        pass
    except Exception as error:
        # submitit is optional and slow to import, so its errors are known by name.
        if isinstance(error, RuntimeError) and '"srun"' in str(error):
            fail("hydra/launcher=slurm: there is no srun here; start it where SLURM is, or take hydra/launcher=local")
        if type(error).__name__ not in ("UncompletedJobError", "FailedJobError"):
            raise
        if type(error).__name__ == "FailedJobError":
            # Its second part is the job's traceback, between two dashed lines.
            cause = re.split(r"-{20,}", str(error))[1].strip().splitlines()[-1]
            print(f"error: a job could not begin: {cause}", file=sys.stderr, flush=True)
        # submitit stops waiting at the first job that died; the others go on, and their news are wanted.
        launchers.wait_all()
        failed = 1
    finally:
        heard, dead = launchers.stop_all()
        _jobs.extend(heard.items())
        _died += max(dead, failed)


def _rescore(words: Sequence[str]) -> None:
    """Not a job: no config is composed, and Hydra never sees the words."""
    from experiments.rescore import parse, rescore_all

    try:
        _jobs.extend(rescore_all(parse(words)).items())
    except ValueError as error:
        fail(str(error))


def _command_lines(verb: str) -> list[list[str]]:
    try:
        return expand(verb, sys.argv[1:])
    except ValueError as error:
        fail(str(error))


def explain(error: BaseException, verb: str, argv: Sequence[str]) -> str:
    """What is wrong with the command line or the config, and what would be right, in one sentence."""
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if name.startswith("submitit_"):
            return "hydra/launcher: the launchers need submitit; pip install -c constraints.txt -e '.[slurm]'"
        return f"{group}={name}: there is no such option; choose one of {', '.join(sorted(error.options))}"
    text = str(error)
    cause = error.__cause__ or error
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], verb, argv)
    if match := re.match(r"Error merging override (\S.*)", text):
        return f"{match[1].strip()}: {_first_line(str(cause))}"
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key or text.split(":", 1)[-1].split()[0]
        return f"{key} has no value; give {key}=..."
    where = getattr(error, "full_key", None)
    return f"{where}: {_first_line(text)}" if where else " ".join(line.strip() for line in text.splitlines() if line)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip()


def _unknown_key(key: str, verb: str, argv: Sequence[str]) -> str:
    """Names the knobs that stand where the mistyped one was looked for."""
    parent, _, name = key.rpartition(".")
    group = parent.split(".")[0]
    choices = _group_choices(group, argv)
    for overrides in choices:
        with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            cfg = compose(verb, overrides=overrides, return_hydra_config=True)
        picked = cfg.hydra.runtime.choices.get(group)
        node = (
            OmegaConf.select(cfg, parent)
            if parent
            else OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
        )
        valid = sorted(str(k) for k in node if not str(k).startswith("_")) if isinstance(node, DictConfig) else []
        if name in valid:
            continue
        if not parent:
            return f"{key}: there is no such key; the keys are {', '.join(valid)}"
        where = f"{group}={picked}" if picked and parent == group else parent
        return f"{key}: {where} has no such knob; " + (f"it has {', '.join(valid)}" if valid else "it has none")
    if len(choices) > 1:
        # Hydra first composes the sweep without what is swept, that is with the group's default.
        return f"{key}: where {group}= is swept, write it with two plus signs: ++{key}=..."
    return f"{key}: there is no such key; `python {verb}.py --cfg job` lists them"


def _group_choices(group: str, argv: Sequence[str]) -> list[list[str]]:
    """The config choices on the command line: one list for each value that a sweep gives to `group`."""
    fixed: list[str] = []
    swept: list[str] = []
    for override in OverridesParser.create().parse_overrides([a for a in argv if not a.startswith("-")]):
        name = override.key_or_group
        if (CONF / name).is_dir():
            values = _values(override)
            swept += [f"{name}={value}" for value in values] if name == group else []
            fixed += [f"{name}={values[0]}"] if name != group else []
    return [[*fixed, choice] for choice in swept] or [fixed]


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.value())]
