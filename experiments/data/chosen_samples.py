"""The samples that a job answers: all of a dataset, some that are drawn from it, or a shard; made when they are needed.

A dataset may draw its pictures, or have more samples than should be in memory at once. What is held here are ids.
"""

from collections.abc import Sequence
from typing import overload

import pyarrow as pa

from experiments.data.sample import Dataset, Ranked, Sample, draw_ids, draw_ranks
from shirg import UserError


class SampleIds(Sequence[str]):
    """Texts in one Arrow array: an id takes 4 bytes more than its letters, in a list of Python's about 60 more."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = pa.array(ids, pa.string())

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> list[str]: ...

    def __getitem__(self, at: int | slice) -> str | list[str]:
        found: str | list[str] = self._ids[at].to_pylist() if isinstance(at, slice) else self._ids[at].as_py()
        return found


class ChosenSamples(Sequence[Sample]):
    """Samples of a dataset by their indices. Each access makes the sample again; a slice is a list."""

    def __init__(self, dataset: Dataset, indices: Sequence[int], ids: Sequence[str]) -> None:
        """`ids`: those of the samples at `indices`."""
        self._dataset, self._indices, self.ids = dataset, indices, SampleIds(ids)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> Sample: ...

    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...

    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return [self._dataset[i] for i in self._indices[at]]
        return self._dataset[self._indices[at]]

    def every(self, step: int, first: int) -> "ChosenSamples":
        """Every `step`-th sample, from number `first` on."""
        return ChosenSamples(self._dataset, self._indices[first::step], self.ids[first::step])

    def __reduce__(self) -> tuple[type[list[Sample]], tuple[list[Sample]]]:
        """Another process gets the samples, not the whole dataset."""
        return list, (list(self),)


def choose_samples(dataset: Dataset, limit: int | None, seed: int) -> ChosenSamples:
    """All samples, or `limit` of them drawn with the seed by their ids; the dataset's order stays.

    Raises:
        UserError: the limit is not positive, or two samples have the same id.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a positive number of samples, or null for all of them")
    n = len(dataset)
    if limit is not None and limit < n and isinstance(dataset, Ranked):
        indices: Sequence[int] = sorted(map(dataset.at_rank, draw_ranks(n, limit, seed)))
        return ChosenSamples(dataset, indices, [dataset[i].id for i in indices])
    ids = [dataset[i].id for i in range(n)]
    if len(set(ids)) < n:
        raise UserError(f"data: {dataset.name} has two samples with the same id, so answers are ambiguous")
    if limit is None or limit >= n:
        return ChosenSamples(dataset, range(n), ids)
    drawn = draw_ids(ids, limit, seed)
    indices = [i for i, name in enumerate(ids) if name in drawn]
    return ChosenSamples(dataset, indices, [ids[i] for i in indices])


def shard_of(samples: ChosenSamples, shard: int, shards: int) -> ChosenSamples:
    """Every `shards`-th sample, from number `shard` on."""
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} shards={shards}: shards are numbered from 0 to shards - 1")
    if len(samples) < shards:
        raise UserError(f"shards={shards}: there are only {len(samples)} samples")
    return samples.every(shards, shard)
