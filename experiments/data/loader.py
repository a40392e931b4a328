"""Training batches by step: the same for the same step in every run, wherever it starts and however many share it.

A stream gives the sample of any place, so that nothing has to be counted up to get there.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from PIL import Image
from torch.utils.data import DataLoader

from experiments.data.sample import Dataset, Sample, Varied
from lavida_adapter import TrainBatch
from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter import LavidaConfig
    from lavida_adapter.views import Views
    from shirg import Geometry
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import lightning as L
import torch
from torch.utils.data import IterableDataset, get_worker_info

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
            raise UserError(f"batch_size={batch_size}: give at least 1")
        if batch_size % world:
            raise UserError(f"batch_size={batch_size} is shared by {world} processes: give a multiple of {world}")
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


Pictures = Sequence["Image.Image | Views"]
"""One for each sample; samples that share a picture share the object, and the tower runs once for it."""


def picture_of(sample: Sample) -> str:
    """The name of the sample's picture; samples that share it are one cluster."""
    return str(sample.meta.get("picture", sample.id))


def load_pictures(batch: Sequence[Sample]) -> list[Image.Image]:
    """One picture per sample, each loaded once."""
    pictures: dict[str, Image.Image] = {}
    for sample in batch:
        if picture_of(sample) not in pictures:
            pictures[picture_of(sample)] = sample.load_image()
    return [pictures[picture_of(sample)] for sample in batch]


@dataclass(frozen=True)
class CutBatches:
    """Batches as a data loader's workers see them: by number, cut for a model and a geometry."""

    batches: Sequence[Sequence[Sample]]
    config: "LavidaConfig"
    geometry: "Geometry"

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> "list[Views] | Exception":
        """What goes wrong is given back: a loader would wrap its one sentence into a worker's traceback."""
        from lavida_adapter.views import cut

        try:
            images = load_pictures(self.batches[number])
        except Exception as error:
            return error
        views = {id(image): cut(image, self.config, self.geometry) for image in images}
        return [views[id(image)] for image in images]


def read_ahead(
    batches: Sequence[Sequence[Sample]], config: "LavidaConfig", geometry: "Geometry", workers: int
) -> Iterator[Pictures | None]:
    """For each batch its pictures, cut by so many processes; None without workers: load them yourself.

    Raises:
        UserError: for a negative number, and whatever loading a picture raises.
    """
    if workers < 0:
        raise UserError(f"workers={workers}: give 0 or more")
    if not workers:
        yield from [None] * len(batches)
        return
    loader: DataLoader[Any] = DataLoader(
        CutBatches(batches, config, geometry),  # type: ignore[arg-type]  # a map by number is all that it needs
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="spawn",  # CUDA does not survive a fork
    )
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield cast(Pictures, found)


def _as_it_is(views: object) -> object:
    return views


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
        # Batches hold pictures and texts; the model puts what it makes of them on its own device.
        return batch


ROUND = 10_000
"""Samples in which the ratio is kept exactly; it is rounded to one part in so many."""


class Mixture:
    """A stream (`experiments.data.loader`) of samples from datasets in the ratio of their weights.

    In every round of 10,000 samples each dataset has its exact share, in an order drawn with the seed; within its share
    it goes through its own epochs. So a small dataset is repeated and a large one is not finished, as the weights say.

    Args:
        parts: datasets by name.
        weights: how much of each, above 0.
        seed: for the order.
    """

    def __init__(self, *, parts: Mapping[str, Dataset], weights: Mapping[str, float], seed: int = 0) -> None:
        self.seed = seed
        self._counts = _apportion(weights)
        self._streams = {name: Shuffled(part, f"{seed}|{name}") for name, part in parts.items()}
        self._round: tuple[int, list[tuple[str, int]]] = (-1, [])

    def __call__(self, place: int) -> Sample:
        name, own = self.origin(place)
        return self._streams[name](own)

    def origin(self, place: int) -> tuple[str, int]:
        """Which part the sample at a place comes from, and its place among that part's own."""
        number, within = divmod(place, ROUND)
        if self._round[0] != number:
            turns = [name for name, n in self._counts.items() for _ in range(n)]
            random.Random(f"{self.seed}|{number}").shuffle(turns)
            taken = {name: number * n for name, n in self._counts.items()}
            order = []
            for name in turns:
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
    """Whole numbers in the ratio of the weights that add up to a round: rounded down, the largest rests first up."""
    total = sum(weights.values())
    exact = {name: ROUND * weight / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: ROUND - sum(counts.values())]:
        counts[name] += 1
    return counts
