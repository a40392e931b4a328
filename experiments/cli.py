"""The command lines of eval.py and train.py: one sentence for bad input, a traceback for a bug, an exit code."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.analysis.turns import is_due
from experiments.errors import RESUME, ConfigError, explain, fail, one_sentence
from experiments.jobs.launchers import Session, session
from experiments.option_help import help_of, wants
from experiments.override_grammar import below_null, check_keys, check_words
from experiments.sweeps import expand

WIDE = "--wide"
"""Prints every column of the table, however wide the terminal is."""


def run(main: Callable[[], Any], command: str) -> None:
    """Runs a Hydra main once for each product of a sweep, prints the study's table, and exits with 1 if a job failed.

    With HYDRA_FULL_ERROR=1 in the environment every error keeps its traceback.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    wide = WIDE in sys.argv
    sys.argv[1:] = [word for word in sys.argv[1:] if word != WIDE]
    with session() as jobs, one_sentence(RESUME):
        try:
            if wants(sys.argv[1:]):
                print(help_of(command, sys.argv[1:]))
                return
            if command == "eval" and any(word.startswith("rescore=") for word in sys.argv[1:]):
                _rescore(sys.argv[1:], jobs)
            else:
                for words in _command_lines(command):
                    sys.argv[1:] = words
                    _run_once(main, command)
        except (HydraException, OmegaConfBaseException) as error:
            if wants_traceback:
                raise
            fail(explain(error, command, sys.argv[1:]))
        if any(jobs.outcomes.values()):
            _publish(dict.fromkeys(folder.parent for folder in jobs.outcomes), wide)
            if jobs.skipped:
                was = "1 job was" if jobs.skipped == 1 else f"{jobs.skipped} jobs were"
                print(f"{was} finished already and kept; overwrite=true starts again")
    if jobs.died:
        died = "1 job" if jobs.died == 1 else f"{jobs.died} jobs"
        fail(
            f"{died} died without reporting a result. Rerun the same command with resume=true to run the missing ones."
        )
    if not all(jobs.outcomes.values()):
        sys.exit(1)


def update_report(study: Path) -> None:
    """Writes the table and the page of a study again, after one of its jobs has ended, at most once a minute."""
    if is_due(study):
        from experiments.report.publish import refresh_report

        refresh_report(study)


def _publish(studies: Sequence[Path] | dict[Path, None], wide: bool) -> None:
    from experiments.report.publish import publish

    for study in studies:
        publish(study, show=True, wide=wide)


def _run_once(main: Callable[[], Any], command: str) -> None:
    """One command line of Hydra's."""
    if _submits(sys.argv[1:]) and shutil.which("srun") is None:
        fail("hydra/launcher=slurm: there is no srun on this machine; start it on a SLURM node, or use local")
    try:
        main()
    except (AssertionError, AttributeError) as error:
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)][-1]
        answer = below_null(command, sys.argv[1:]) if raised_in.startswith("omegaconf.") else None
        if answer is None:
            raise
        raise ConfigError(answer) from error


def _submits(words: Sequence[str]) -> bool:
    """Whether a command line starts a sweep on SLURM."""
    return "hydra/launcher=slurm" in words and bool({"-m", "--multirun"} & set(words))


def _rescore(words: Sequence[str], jobs: Session) -> None:
    """Not a job: no config is composed, and Hydra never gets the words."""
    from experiments.rescore import parse, rescore_all

    jobs.outcomes |= rescore_all(parse(words))


def _command_lines(command: str) -> list[list[str]]:
    lines = expand(command, sys.argv[1:])
    for words in lines:
        check_words(words)
        check_keys(command, words)
    return lines
