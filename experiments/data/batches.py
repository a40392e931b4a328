"""Training batches by step: the same for the same step in every run, wherever it starts and however many share it.

A stream gives the sample of any place, so that nothing has to be counted up to get there.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from PIL import Image

from experiments.data.sample import Dataset, Sample, Varied
from lavida_adapter import TrainBatch

Prepare = Callable[[int, Image.Image], Any]
"""What the model makes of a picture before its first layer, for a step; no device is touched."""


class Stream(Protocol):
    """Samples without end."""

    def __call__(self, place: int) -> Sample: ...


class Shuffled:
    """A dataset's samples: each once per epoch, in an order that depends on seed and epoch.

    Samples that share a picture stay together, so that a batch encodes each of its pictures once.
    """

    def __init__(self, dataset: Dataset, seed: int | str) -> None:
        self.dataset, self.seed = dataset, seed
        self.block = dataset.questions_per_picture
        self.n_blocks = -(-len(dataset) // self.block)
        self._order: tuple[int, list[int]] = (-1, [])

    def __call__(self, place: int) -> Sample:
        epoch, index = self.index(place)
        return self.dataset.at(index, epoch) if isinstance(self.dataset, Varied) else self.dataset[index]

    def index(self, place: int) -> tuple[int, int]:
        """Epoch and index of the sample at a place."""
        epoch, within = divmod(place, self.n_blocks * self.block)
        if self._order[0] != epoch:
            order = list(range(self.n_blocks))
            random.Random(f"{self.seed}|{epoch}").shuffle(order)
            self._order = (epoch, order)
        block, turn = divmod(within, self.block)
        return epoch, min(self._order[1][block] * self.block + turn, len(self.dataset) - 1)


class Batches:
    """The batch of each step. Of several processes each draws its own part; the parts together are the batch of one."""

    def __init__(
        self, stream: Stream, batch_size: int, *, prepare: Prepare | None = None, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if batch_size % world:
            raise ValueError(f"batch_size={batch_size} is shared by {world} processes: give a multiple of {world}")
        self.stream, self.batch_size = stream, batch_size
        self.part, self.rank = batch_size // world, rank
        self.prepare = prepare

    def __call__(self, step: int) -> TrainBatch:
        prepare = None if self.prepare is None else partial(self.prepare, step)
        return collate([self.stream(place) for place in self.places(step)], prepare)

    def places(self, step: int) -> range:
        begin = step * self.batch_size + self.rank * self.part
        return range(begin, begin + self.part)


def collate(samples: Sequence[Sample], prepare: Callable[[Image.Image], Any] | None = None) -> TrainBatch:
    """A batch of samples; each picture is loaded and prepared once.

    What is learned is the target, else the first answer.
    """
    pictures: dict[Any, Any] = {}
    images = []
    for sample in samples:
        key = (sample.dataset, sample.meta.get("picture", sample.id))
        if key not in pictures:
            picture = sample.load_image()
            pictures[key] = picture if prepare is None else prepare(picture)
        images.append(pictures[key])
    return TrainBatch(
        images=images,
        questions=[s.question for s in samples],
        answers=[s.target or s.answers[0] for s in samples],
        ids=[s.id for s in samples],
        prompts=[s.prompt for s in samples],
        boxes=[s.boxes for s in samples],
        histories=[s.history for s in samples],
    )
