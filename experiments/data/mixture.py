"""`data=mixture`: several datasets to train on at once, in a ratio."""

import random
from collections.abc import Iterable, Mapping

from experiments.data.batches import Shuffled
from experiments.data.sample import Dataset, Sample

ROUND = 10_000
"""Samples in which the ratio is kept exactly; it is rounded to one part in so many."""


class Mixture:
    """A stream (`experiments.data.batches`) of samples from datasets in the ratio of their weights.

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
    """Raises ValueError unless there is a weight for each part, none negative and one above 0."""
    if odd := sorted(set(parts) ^ weights.keys())[:1]:
        raise ValueError(f"data.weights and data.parts must name the same datasets: {odd[0]} is in one of them alone")
    if any(not 0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"data.weights={dict(weights)}: give numbers from 0 on, and one at least above 0")


def _apportion(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in the ratio of the weights that add up to a round: rounded down, the largest rests first up."""
    total = sum(weights.values())
    exact = {name: ROUND * weight / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: ROUND - sum(counts.values())]:
        counts[name] += 1
    return counts
