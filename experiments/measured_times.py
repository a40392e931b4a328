"""What was timed, in short: medians, quartiles, and whether the machine was busy meanwhile.

A machine is busy when threads of this process wait for a core. Linux counts for every thread the nanoseconds in which
it could have run and had none (`/proc/PID/task/*/schedstat`). On other systems nothing is known.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

BUSY = 0.05
"""Share of the time that a thread waits for a core, above which times say something about other processes, too."""


class LoadMeter:
    """Measures from its construction on.

    Args:
        tasks: the folder with one folder for each thread of this process.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._before, self._began = self._waits_s(), time.perf_counter()

    def waited(self) -> float | None:
        """The share of the time since then that the thread that waited most had no core; None where unknown."""
        now, passed_s = self._waits_s(), time.perf_counter() - self._began
        if not now or passed_s <= 0:
            return None
        return max(seconds - self._before.get(thread, 0.0) for thread, seconds in now.items()) / passed_s

    def _waits_s(self) -> dict[str, float]:
        """Seconds that each thread has waited for a core since it began."""
        found = {}
        for path in self._tasks.glob("*/schedstat"):
            with suppress(OSError, ValueError, IndexError):  # a thread that has just ended
                found[path.parent.name] = int(path.read_text().split()[1]) / 1e9
        return found


def is_busy(waited: float | None) -> bool:
    """Whether the machine was busy, by the share that was waited; False where that is unknown."""
    return waited is not None and waited > BUSY


LEAST_BATCHES = 4
"""Timed batches that have quartiles."""


def summarise_stages(timings: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Medians and quartiles over batches of the milliseconds per sample, by stage and in all.

    Few batches have no quartiles.

    Args:
        timings: those of each batch, by stage.
    """
    total = np.sum(list(timings.values()), axis=0)
    by_stage = {**timings, "total": total}
    summary: dict[str, Any] = {
        "ms_per_sample": {stage: float(np.median(times)) for stage, times in by_stage.items()},
        "batches_timed": len(total),
    }
    if len(total) >= LEAST_BATCHES:
        summary["ms_quartiles"] = {s: np.percentile(times, (25, 75)).tolist() for s, times in by_stage.items()}
    return summary
