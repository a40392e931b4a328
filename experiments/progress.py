"""One progress bar on a terminal; elsewhere a line now and then, so that log files stay readable."""

import sys
import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_S = 30.0


class Progress:
    """Counts samples of a job."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._spoke = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns)
            self._task = self._bar.add_task(self.title, total=self.total)
            self._bar.start()
        else:
            print(f"run   {self.title}: {self.total} samples", flush=True)
        return self

    def advance(self, n: int) -> None:
        self.done += n
        if self._bar is not None:
            self._bar.advance(self._task, n)
        elif time.monotonic() - self._spoke > EVERY_S:
            self._spoke = time.monotonic()
            print(f"      {self.title}: {self.done} of {self.total}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
