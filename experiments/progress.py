"""How far a job is: a bar on a terminal, and elsewhere a line now and then.

Lines go into log files, which many programs read: they have no codes of a terminal, and there are few of them.
"""

import sys
import time
from datetime import timedelta
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class Progress:
    """One progress bar on a terminal; elsewhere a line now and then, so that log files stay readable.

    Args:
        title: what runs.
        total: how many of `unit` there are in all.
        done: those that were done before, in a job that goes on.
    """

    def __init__(self, title: str, total: int, unit: str = "samples", done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._began = done, time.monotonic()
        self._printed, self._note = self._began, ""
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"))
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
            self._bar.start()
        else:
            print(f"run   {self.title}: {self.total} {self.unit}", flush=True)
        return self

    def advance(self, n: int, note: str = "") -> None:
        """`note` is shown behind the count; an empty one keeps the last."""
        self.done += n
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=self._note)
        elif time.monotonic() - self._printed > EVERY_S:
            self._printed = time.monotonic()
            line = f"      {self.title}: {self.done} of {self.total}, {self._left()} left  {self._note}"
            print(line.rstrip(), flush=True)

    def _left(self) -> timedelta:
        pace_s = (time.monotonic() - self._began) / max(1, self.done - self._first)
        return timedelta(seconds=round(pace_s * (self.total - self.done)))

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
