"""Batches to Lightning, drawn here or ahead of time by worker processes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")
Draw = Callable[[int], Any]
"""Step -> batch."""


class StepDataset(IterableDataset[Any]):
    """Batches of the steps from `begin` to `end`; of several workers each draws every so many, and the loader takes
    turns among them, so that the order is that of the steps."""

    def __init__(self, draw: Draw, begin: int, end: int) -> None:
        self.draw, self.begin, self.end = draw, begin, end

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return ahead(map(self.draw, range(self.begin, self.end)))
        return map(self.draw, range(self.begin + worker.id, self.end, worker.num_workers))


def ahead(items: Iterator[T], n: int = 2) -> Iterator[T]:
    """The items in their order, the next `n` made by a thread while one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(n))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield cast(T, item)


class TrainData(L.LightningDataModule):
    """Feeds a stage step by step; a resumed run goes on with the batch of its own step.

    Without workers a thread draws ahead. Workers are processes, started afresh rather than forked, which CUDA does not
    survive; they touch no device.
    """

    def __init__(self, draw: Draw, steps: int, workers: int = 0) -> None:
        super().__init__()
        if workers < 0:
            raise ValueError(f"trainer.workers={workers}: give 0 or more")
        self.draw, self.steps, self.workers = draw, steps, workers

    def train_dataloader(self) -> DataLoader[Any]:
        done = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(
            StepDataset(self.draw, done, self.steps),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Batches hold pictures and texts; the model puts what it makes of them on its own device.
        return batch
