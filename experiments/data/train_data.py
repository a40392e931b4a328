"""Feeds training step by step: batches made in advance by a thread or by worker processes, as a Lightning datamodule.

It is a file of its own because Lightning takes a second to import, and evaluation does without it.
"""

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shirg import UserError

T = TypeVar("T")
Draw = Callable[[int], Any]
"""Step -> batch."""


class StepDataset(IterableDataset[Any]):
    """Batches of the steps from `begin` to `end`.

    With n workers each draws every n-th batch; the loader takes them in turn, so that they come in the order of the
    steps.
    """

    def __init__(self, draw: Draw, begin: int, end: int) -> None:
        self.draw, self.begin, self.end = draw, begin, end

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return prefetch(map(self.draw, range(self.begin, self.end)))
        return map(self._drawn, range(self.begin + worker.id, self.end, worker.num_workers))

    def _drawn(self, step: int) -> Any:
        """The batch, or the error: raised here, the worker's traceback would stand before a user's one sentence.

        A bug keeps that traceback as a note.
        """
        try:
            return self.draw(step)
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            return error


def prefetch(items: Iterator[T], n: int = 2) -> Iterator[T]:
    """The items in their order; a thread computes the next `n` while one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(n))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, items, end))
            yield cast(T, item)


class TrainData(L.LightningDataModule):
    """The batches of a stage; a resumed run continues with the batch of its own step.

    Without workers a thread prefetches. Workers are processes that are spawned, because CUDA does not survive a fork;
    they touch no device.
    """

    def __init__(self, draw: Draw, steps: int, workers: int = 0) -> None:
        super().__init__()
        if workers < 0:
            raise UserError(f"trainer.workers={workers}: give 0 or more")
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
        if isinstance(batch, Exception):
            raise batch
        # Batches hold pictures and texts; the model moves what it computes from them to its own device.
        return batch
