"""Training batches by step, from one dataset or from a mixture of several.

A stream gives the sample at any position. The batch of a step is therefore the same in every run, whatever step the run
starts at and however many processes share it.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from PIL import Image

from experiments.data.image_io import source_of
from experiments.data.sample import Dataset, Sample, Varied
from lavida_adapter import TrainBatch
from shirg import UserError

Prepare = Callable[[int, Image.Image], Any]
"""(step, picture) -> what the model's first layer reads; no device is touched."""
ROUND = 10_000
"""Samples in which a mixture keeps its ratio exactly; the ratio is rounded to one part in so many."""


class Stream(Protocol):
    """Samples without end."""

    def __call__(self, position: int) -> Sample: ...


class Shuffled:
    """A dataset's samples: each once per epoch, in an order that depends on seed and epoch.

    Samples that share a picture stay together, so that a batch encodes each of its pictures once.
    """

    def __init__(self, dataset: Dataset, seed: int | str) -> None:
        self.dataset, self.seed = dataset, seed
        self.block = dataset.questions_per_picture
        self.n_blocks = -(-len(dataset) // self.block)
        self._order: tuple[int, list[int]] = (-1, [])

    def __call__(self, position: int) -> Sample:
        epoch, index = self.index(position)
        return self.dataset.at(index, epoch) if isinstance(self.dataset, Varied) else self.dataset[index]

    def index(self, position: int) -> tuple[int, int]:
        """Epoch and index of the sample at a position."""
        epoch, within = divmod(position, self.n_blocks * self.block)
        if self._order[0] != epoch:
            order = list(range(self.n_blocks))
            random.Random(f"{self.seed}|{epoch}").shuffle(order)
            self._order = (epoch, order)
        block, question = divmod(within, self.block)
        return epoch, min(self._order[1][block] * self.block + question, len(self.dataset) - 1)


class Mixture:
    """A stream of samples from several datasets, in the ratio of their weights.

    In every round of 10,000 samples each dataset has its exact share, in an order drawn with the seed. Each dataset has
    its own epochs: a small one is repeated and a large one may never be finished, as the weights say.

    Args:
        parts: datasets by name.
        weights: weight of each dataset, above 0.
        seed: for the order.
    """

    def __init__(self, *, parts: Mapping[str, Dataset], weights: Mapping[str, float], seed: int = 0) -> None:
        self.seed = seed
        self._counts = _apportion(weights)
        self._streams = {name: Shuffled(part, f"{seed}|{name}") for name, part in parts.items()}
        self._round: tuple[int, list[tuple[str, int]]] = (-1, [])

    def __call__(self, position: int) -> Sample:
        name, own = self.origin(position)
        return self._streams[name](own)

    def origin(self, position: int) -> tuple[str, int]:
        """The part that the sample at a position comes from, and its position in that part's own stream."""
        number, within = divmod(position, ROUND)
        if self._round[0] != number:
            names = [name for name, n in self._counts.items() for _ in range(n)]
            random.Random(f"{self.seed}|{number}").shuffle(names)
            taken = {name: number * n for name, n in self._counts.items()}
            order = []
            for name in names:
                order.append((name, taken[name]))
                taken[name] += 1
            self._round = (number, order)
        return self._round[1][within]


def check_weights(parts: Iterable[str], weights: Mapping[str, float]) -> None:
    """Raises UserError unless there is a weight for each part, none negative and one above 0."""
    if odd := sorted(set(parts) ^ weights.keys())[:1]:
        raise UserError(f"data.weights and data.parts must name the same datasets: {odd[0]} is in one of them alone")
    if any(not 0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"data.weights={dict(weights)}: give numbers from 0 on, and one at least above 0")


def _apportion(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in the ratio of the weights that add up to a round, by the method of largest remainders."""
    total = sum(weights.values())
    exact = {name: ROUND * weight / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: ROUND - sum(counts.values())]:
        counts[name] += 1
    return counts


class Batches:
    """The batch of each step. Of `world` processes each draws its own part; together they are the batch of one."""

    def __init__(
        self, stream: Stream, batch_size: int, *, prepare: Prepare | None = None, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: give at least 1")
        if batch_size % world:
            raise UserError(f"batch_size={batch_size} is shared by {world} processes: give a multiple of {world}")
        self.stream, self.batch_size = stream, batch_size
        self.part, self.rank = batch_size // world, rank
        self.prepare = prepare

    def __call__(self, step: int) -> TrainBatch:
        prepare = None if self.prepare is None else partial(self.prepare, step)
        return collate([self.stream(position) for position in self.positions(step)], prepare)

    def positions(self, step: int) -> range:
        """The positions in the stream that this process takes."""
        begin = step * self.batch_size + self.rank * self.part
        return range(begin, begin + self.part)


def collate(samples: Sequence[Sample], prepare: Callable[[Image.Image], Any] | None = None) -> TrainBatch:
    """A batch of samples; each picture is loaded and prepared once."""
    pictures: dict[Any, Any] = {}
    images = []
    for sample in samples:
        key = source_of(sample)
        if key not in pictures:
            picture = sample.load_image()
            pictures[key] = picture if prepare is None else prepare(picture)
        images.append(pictures[key])
    return TrainBatch(
        images=images,
        questions=[s.question for s in samples],
        answers=[s.to_learn for s in samples],
        ids=[s.id for s in samples],
        prompts=[s.prompt for s in samples],
        boxes=[s.boxes for s in samples],
        histories=[s.history for s in samples],
    )
