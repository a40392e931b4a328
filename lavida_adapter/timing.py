"""Timers for the stages of a batch; the model only names its stages."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Timer(Protocol):
    """Measures the stages views, tower, relevance, select, project, prefill, cache and denoise. Stages do not nest."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...


class NoTimer:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


class Pausing:
    """Wraps a timer whose stages must not nest: an inner stage pauses the outer one."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._running: list[tuple[str, AbstractContextManager[None]]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer = self._running[-1:]
        self._stop()
        self._start(name)
        try:
            yield
        finally:
            self._stop()
            for paused, _ in outer:
                self._start(paused)

    def _start(self, name: str) -> None:
        stage = self._timer.stage(name)
        stage.__enter__()
        self._running.append((name, stage))

    def _stop(self) -> None:
        if self._running:
            self._running.pop()[1].__exit__(None, None, None)


class StageTimer:
    """Sums the time of each named stage of a batch.

    On CUDA a stage records two events, and only `collect`, after the batch, synchronises. On a CPU the wall clock is
    read. Stages do not nest.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self.device))
            try:
                yield
            finally:
                end.record(torch.cuda.current_stream(self.device))
                self._events.append((name, start, end))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def collect(self) -> dict[str, float]:
        """Milliseconds by stage since the last call."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
        taken = {name: 1000 * seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return taken
