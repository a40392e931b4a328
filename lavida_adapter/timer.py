"""How the model is timed from outside: it names its stages, a timer does with them what it likes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Timer(Protocol):
    """Measures the stages views, tower, relevance, select, project, prefill and denoise; they do not nest."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...


class NoTimer:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()
