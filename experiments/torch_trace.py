"""`profiler=torch`: what a few batches or training steps do, as a trace for a browser and a snapshot of GPU memory.

The trace opens in https://ui.perfetto.dev or chrome://tracing, the snapshot in https://pytorch.org/memory_viz. The
first batch warms up; the next ones are recorded. Recording takes time, so an evaluation leaves these batches out of its
times.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from experiments.atomic_files import write_atomic

TRACE, MEMORY = "trace.json.gz", "memory.pickle"
WARM_UP, RECORDED = 1, 3
"""Batches or steps."""
MOST_EVENTS = 100_000
"""Allocations in a snapshot, the latest."""


class TorchTrace:
    """Records the first batches or steps inside the block; `step` ends one. It does nothing without a folder."""

    def __init__(self, folder: Path | None, device: torch.device | None = None) -> None:
        self.folder, self.device = folder, device
        self._on_cuda = device is not None and device.type == "cuda"
        self._done = 0
        self._profile: profile | None = None

    @property
    def is_recording(self) -> bool:
        return self._profile is not None

    def __enter__(self) -> Self:
        if self.folder is None:
            return self
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, device=self.device)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profile.start()
        return self

    def step(self) -> None:
        """A batch or a training step has ended."""
        if self._profile is None:
            return
        self._done += 1
        self._profile.step()
        if self._done == WARM_UP + RECORDED:
            self._stop()

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        if (running := self._profile) is None:
            return
        self._profile = None
        running.stop()
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None, device=self.device)
        if self._done <= WARM_UP:
            print(f"profiler  nothing recorded: the first {WARM_UP} of {self._done} batches or steps only warms up")

    def _write(self, found: profile) -> None:
        """Called by torch with the recorded batches."""
        assert self.folder is not None
        if self._done <= WARM_UP:  # stopped before the first batch to record had ended
            return
        writers: dict[str, Callable[[str], None]] = {TRACE: found.export_chrome_trace}
        if self._on_cuda:
            writers[MEMORY] = torch.cuda.memory._dump_snapshot
        with TemporaryDirectory() as place:
            for name, write in writers.items():
                write(str(Path(place, name)))
                write_atomic(self.folder / name, Path(place, name).read_bytes())
        print(f"profiler  {', '.join(writers)} in {self.folder}")
