"""Progressive LoRA: a few ranks first, more when the loss stops falling (docs/method.md, "Recipes").

All ranks exist from the start, so that shapes, optimiser and checkpoints never change. Ranks that have not begun are
held at zero by stopping the gradient of their column of B: the update they add is 0 before the step at which they
begin and still 0 right after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Growth:
    """When ranks are added: doubled each time `patience` steps in a row lower their mean loss by less than `gain`."""

    start: int = 16
    patience: int = 200
    gain: float = 0.01
    """As a share of the best mean so far."""

    def __post_init__(self) -> None:
        if self.start < 1 or self.patience < 1 or not 0 <= self.gain < 1:
            raise ValueError(
                f"lora.grow={{start: {self.start}, patience: {self.patience}, gain: {self.gain}}}: give a rank and a "
                "number of steps of at least 1, and a share in [0, 1)"
            )


class RankGrowth:
    """Lets the first `rank` columns of every B learn, and more of them when told to by the loss."""

    def __init__(self, config: Growth, most: int, factors_B: list[nn.Parameter]) -> None:
        """`factors_B` are the B matrices [out, r] of all LoRA layers; those of a smaller rank are used up sooner."""
        self.config, self.most, self.rank = config, most, config.start
        self.best: float | None = None
        self.seen = 0
        self.total = torch.zeros((), dtype=torch.float64)
        for factor in factors_B:
            factor.register_hook(self._only_begun)

    def _only_begun(self, gradient_OR: Tensor) -> Tensor:
        begun_R = torch.arange(gradient_OR.shape[1], device=gradient_OR.device) < self.rank
        return gradient_OR * begun_R

    def observe(self, loss: Tensor) -> float | None:
        """Takes the loss of a step; at the end of each `patience` steps their mean, else None."""
        if self.rank >= self.most:
            return None
        self.total = self.total.to(loss.device) + loss.detach()
        self.seen += 1
        if self.seen < self.config.patience:
            return None
        mean = (self.total / self.seen).item()
        self.seen, self.total = 0, torch.zeros_like(self.total)
        return mean

    def decide(self, mean: float) -> bool:
        """Compares the mean of a stretch of steps with the best so far; True when ranks were added."""
        if self.best is None or mean < self.best * (1 - self.config.gain):
            self.best = mean
            return False
        self.rank, self.best = min(2 * self.rank, self.most), min(self.best, mean)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "best": self.best, "seen": self.seen, "total": self.total.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rank, self.best, self.seen = state["rank"], state["best"], state["seen"]
        self.total = torch.tensor(state["total"], dtype=torch.float64)
