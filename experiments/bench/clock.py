"""Repeated timing of one call: the wall clock on a CPU, events on CUDA."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every repetition."""

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    """Time of all threads of this process, which a busy machine disturbs less; empty on CUDA."""

    @property
    def median(self) -> float:
        return statistics.median(self.wall_ms)

    @property
    def least(self) -> float:
        return min(self.wall_ms)

    def report(self) -> dict[str, Any]:
        return {
            "ms": self.median,
            "ms_min": self.least,
            "cpu_ms": statistics.median(self.cpu_ms) if self.cpu_ms else None,
            "ms_all": list(self.wall_ms),
        }


def time_call(call: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 2) -> Timing:
    """Times `call`, after some calls that are not counted."""
    for _ in range(warm_up):
        call()
    if device.type == "cuda":
        return Timing(tuple(_event_ms(call, device) for _ in range(repeats)), ())
    wall, cpu = [], []
    for _ in range(repeats):
        wall_began, cpu_began = time.perf_counter(), time.process_time()
        call()
        wall.append(1000 * (time.perf_counter() - wall_began))
        cpu.append(1000 * (time.process_time() - cpu_began))
    return Timing(tuple(wall), tuple(cpu))


def _event_ms(call: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))
