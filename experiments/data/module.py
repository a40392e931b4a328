"""Training batches from a dataset: the same batch for the same step in every run, wherever it starts."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from experiments.data.sample import Dataset, Sample
from lavida_adapter import TrainBatch

Draw = Callable[[int], Any]
"""Step -> batch."""


class Steps(IterableDataset[Any]):
    """Batches of the steps from `begin` to `end`."""

    def __init__(self, draw: Draw, begin: int, end: int) -> None:
        self.draw, self.begin, self.end = draw, begin, end

    def __iter__(self) -> Iterator[Any]:
        return map(self.draw, range(self.begin, self.end))


class TrainData(L.LightningDataModule):
    """Feeds a stage step by step; a resumed run goes on with the batch of its own step."""

    def __init__(self, draw: Draw, steps: int) -> None:
        super().__init__()
        self.draw, self.steps = draw, steps

    def train_dataloader(self) -> DataLoader[Any]:
        done = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(Steps(self.draw, done, self.steps), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Batches hold pictures and texts; the model puts what it makes of them on its own device.
        return batch


class Batches:
    """Draws a training batch by its step: every sample once per epoch, in an order that depends on seed and epoch.

    Samples that share a picture stay together, so that a batch encodes each of its pictures once.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.block = dataset.questions_per_picture
        self.n_blocks = -(-len(dataset) // self.block)
        self._order: tuple[int, list[int]] = (-1, [])

    def __call__(self, step: int) -> TrainBatch:
        return collate([self.dataset[i] for i in self.indices(step)])

    def indices(self, step: int) -> list[int]:
        begin = step * self.batch_size
        return [self._at(i) for i in range(begin, begin + self.batch_size)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, self.n_blocks * self.block)
        if self._order[0] != epoch:
            order = list(range(self.n_blocks))
            random.Random(f"{self.seed}|{epoch}").shuffle(order)
            self._order = (epoch, order)
        block, turn = divmod(within, self.block)
        return min(self._order[1][block] * self.block + turn, len(self.dataset) - 1)


def collate(samples: Sequence[Sample]) -> TrainBatch:
    """A batch of samples; each picture is loaded once, and the first answer is the one to learn."""
    pictures: dict[Any, Image.Image] = {}
    images = []
    for sample in samples:
        key = sample.meta.get("picture", sample.id)
        if key not in pictures:
            pictures[key] = sample.load_image()
        images.append(pictures[key])
    return TrainBatch(
        images=images,
        questions=[s.question for s in samples],
        answers=[s.answers[0] for s in samples],
        ids=[s.id for s in samples],
        prompts=[s.prompt for s in samples],
        boxes=[s.boxes for s in samples],
    )
