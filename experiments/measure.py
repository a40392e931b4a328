"""How long each stage takes and how much memory a job needs, without disturbing what is measured."""

import resource
import statistics
import sys
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


def peak_mib(device: torch.device) -> float:
    """What training shows: the peak of the accelerator, on a CPU that of the whole process."""
    on_device = peak_memory_mib(device)
    if on_device is not None:
        return on_device
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is a CUDA device if there is one, else the CPU; processes that share a machine take one device each."""
    if local_rank and name.startswith("cuda:"):
        raise ValueError(f"device={name}: processes that train together take a device each; give device=cuda")
    if name == "auto" or (name == "cuda" and local_rank):
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        if local_rank >= (count := torch.cuda.device_count()) and name != "cpu":
            raise ValueError(
                f"process {local_rank} of this machine sees {count} CUDA devices: start one process for each device "
                "(under SLURM, with --gpus-per-node rather than --gpus-per-task)"
            )
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
