"""How long each stage takes and how much memory a job needs, without disturbing what is measured."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class StageTimer:
    """Sums the time of each named stage of a batch.

    On CUDA a stage is bracketed by two events, and the only synchronisation is in `collect`, after the batch. On a CPU
    the wall clock is read. Stages do not nest.
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


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory allocated on the accelerator; None on a CPU, where the process holds more than this job."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return device


def summarise_stages(timings: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over batches of the milliseconds per sample, by stage and in all."""
    stages = list(dict.fromkeys(stage for timing in timings for stage in timing))
    medians = {stage: statistics.median(timing.get(stage, 0.0) for timing in timings) for stage in stages}
    return {
        "ms_per_sample": {**medians, "total": statistics.median(sum(timing.values()) for timing in timings)},
        "batches_timed": len(timings),
    }
