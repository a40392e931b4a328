"""Which process writes the files of a study, and when.

Many processes end jobs in one study. All that is written there, table, page, figures and cache, is written under one
lock, by one process that sees all jobs which have ended until then. The others do not wait: whoever finds the lock held
leaves a request, and the holder goes on until there is none.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from experiments.atomic_files import write_atomic

LAST_REFRESH = ".refresh_seconds"
"""How long writing the table and the page took the last time; the file's time says when it was."""
MINUTE = 60.0
"""Seconds: jobs that end write the table and the page at most so often."""
SHARE = 9
"""And only after so many times as long as it took the last time, so that it is at most a tenth of a sweep."""
_LOCK = ".table.lock"
_WANTED = ".table_wanted"

T = TypeVar("T")


def study_lock(study: Path) -> BaseFileLock:
    """The lock of all that is written into a study's folder besides jobs; a process that has it may take it again."""
    return FileLock(study / _LOCK, is_singleton=True)


def is_due(study: Path) -> bool:
    """Whether a job that ends writes the table and the page, whatever the size of the study.

    Time on a file system that runs ahead of this machine's counts as long ago.
    """
    last = study / LAST_REFRESH
    try:
        age, seconds = time.time() - last.stat().st_mtime, float(last.read_text())
    except (OSError, ValueError):  # never written, or torn
        return True
    return not 0 <= age < max(MINUTE, SHARE * seconds)


def in_turn(study: Path, write: Callable[[], T], wait_s: float, *, must: bool = False) -> T | None:
    """Writes under the lock, as often as somebody asks for it meanwhile.

    Args:
        write: must read the jobs itself, so that it sees all that ended before it was called.
        wait_s: seconds to wait for a process that is writing.
        must: also writes what another process has just written.

    Returns:
        What `write` returned the last time. None where another process writes, or has just written, all that was there
        when this was called.
    """
    wanted, found = study / _WANTED, None
    wanted.touch()
    while wanted.exists() or (must and found is None):
        try:
            with study_lock(study).acquire(timeout=wait_s):
                # Another process may have done it while this one waited.
                if wanted.exists() or must:
                    wanted.unlink(missing_ok=True)
                    found = _timed(study, write)
        except Timeout:
            break
    return found


def if_due(study: Path, write: Callable[[], object], write_all: Callable[[], object]) -> None:
    """What a job does at its end: writes where it is due and no other process writes.

    Args:
        write_all: what `in_turn` would write; for requests that come meanwhile.
    """
    if not is_due(study):
        return
    try:
        with study_lock(study).acquire(timeout=0):
            if is_due(study):  # another process may just have written
                _timed(study, write)
    except Timeout:
        return
    if (study / _WANTED).exists():
        in_turn(study, write_all, wait_s=0)


def _timed(study: Path, write: Callable[[], T]) -> T:
    start = time.monotonic()
    found = write()
    write_atomic(study / LAST_REFRESH, f"{time.monotonic() - start:.3f}\n")
    return found
