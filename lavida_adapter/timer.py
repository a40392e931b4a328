"""How the model is timed from outside: it names its stages, a timer does with them what it likes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Timer(Protocol):
    """Measures the stages views, tower, relevance, select, project, prefill, cache and denoise; they do not nest."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...


class NoTimer:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


class Pausing:
    """A timer in which an inner stage pauses the outer one, since stages of the timer behind it must not nest."""

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
