"""The mean over samples that every metric here is."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean of per-sample scores; samples without a score (None) are left out, never counted as 0.

    `compute` is NaN when no sample had a score.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    reads: ClassVar[Literal["text", "tokens"]]
    """Whether a score is made from answers or from kept tokens."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, score: float | None) -> None:
        if score is not None:
            self.total += score
            self.count += 1

    def compute(self) -> Tensor:
        return self.total / self.count


class TextMetric(SampleMean):
    """A metric that compares an answer with its references."""

    reads = "text"

    def score(self, *, prediction: str, references: Sequence[str]) -> float | None:
        """Score of one answer in [0, 1]; None when there is nothing to compare it with."""
        raise NotImplementedError

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        for prediction, accepted in zip(predictions, references, strict=True):
            self.add(self.score(prediction=prediction, references=accepted))
