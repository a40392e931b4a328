"""Progressive LoRA: training starts with some ranks of an adapter, and the others join when the loss stops falling.

The matrices have all their ranks from the start (docs/method.md, "Recipes"). The columns of B that do not take part are
held at zero, so nothing jumps when they join.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shirg import UserError


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Progressive LoRA: training starts with `start` ranks and doubles them when the loss stops falling.

    The loss has stopped falling when its mean over `patience` steps is not lower than the best mean by `gain`.
    """

    start: int = 16
    patience: int = 200
    gain: float = 0.01
    """As a fraction of the best mean so far."""

    def __post_init__(self) -> None:
        if self.start < 1 or self.patience < 1 or not 0 <= self.gain < 1:
            raise UserError(
                f"lora.grow={{start: {self.start}, patience: {self.patience}, gain: {self.gain}}}: give a rank and a "
                "number of steps of at least 1, and a share in [0, 1)"
            )


class RankGrowth:
    """Trains the first `rank` columns of every B, and doubles `rank` when the loss stops falling."""

    def __init__(self, config: Growth, factors_B: Sequence[nn.Parameter]) -> None:
        """`factors_B` are the B matrices [out, r] of all LoRA layers, whose ranks may differ.

        Raises:
            UserError: none of them has more ranks than growth starts with.
        """
        # The matrices themselves say how far to grow: parts of the model can have more or fewer ranks than the others.
        self.most = max(factor.shape[1] for factor in factors_B)
        if config.start >= self.most:
            raise UserError(
                f"lora.grow.start={config.start}: no layer has more than {self.most} ranks, so nothing would grow; "
                "give a smaller start, or no grow"
            )
        self.config, self.rank = config, config.start
        self.best: float | None = None
        self.seen = 0
        self.total = torch.zeros((), dtype=torch.float64)
        for factor in factors_B:
            factor.register_hook(self._mask_unused)

    @property
    def complete(self) -> bool:
        """Whether all ranks take part."""
        return self.rank >= self.most

    def _mask_unused(self, gradient_OR: Tensor) -> Tensor:
        used_R = torch.arange(gradient_OR.shape[1], device=gradient_OR.device) < self.rank
        return gradient_OR * used_R

    def observe(self, loss: Tensor) -> float | None:
        """Adds the loss of a step. Returns the mean over `patience` steps after the last of them, else None.

        All processes go on from the sum in one checkpoint, so all of them must add the same losses.
        """
        if self.complete:
            return None
        self.total = self.total.to(loss.device) + loss.detach()
        self.seen += 1
        if self.seen < self.config.patience:
            return None
        mean = (self.total / self.seen).item()
        self.seen, self.total = 0, torch.zeros_like(self.total)
        return mean

    def decide(self, mean: float) -> bool:
        """Compares a mean of `observe` with the best one so far; returns True when ranks were added."""
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
