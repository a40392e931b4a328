"""The tokens that are left, in lists that are split into even and odd places and lose some of the even ones.

What bipartite methods (ToMe, SAINT's voting, VisPruner's duplicates) have in common. Lists are as long as the host
knows they may be; how much of each is in use, only the device knows.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from baselines.groups import take


@dataclass(frozen=True, eq=False)
class Line:
    """One list of M slots per group: the first n of them hold what is left, in reading order."""

    place_BGM: Tensor
    """int64: the place in the group."""
    n_BG: Tensor

    @classmethod
    def of(cls, left_BGS: Tensor) -> Self:
        order_BGS = torch.sort(left_BGS.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        return cls(order_BGS, left_BGS.sum(-1))

    def even(self) -> Tensor:
        return self.place_BGM[..., 0::2]

    def odd(self) -> Tensor:
        return self.place_BGM[..., 1::2]

    def even_used(self) -> Tensor:
        """bool: which even slots hold a token."""
        return 2 * torch.arange(self.even().shape[-1], device=self.n_BG.device) < self.n_BG[..., None]

    def odd_used(self) -> Tensor:
        return 2 * torch.arange(self.odd().shape[-1], device=self.n_BG.device) + 1 < self.n_BG[..., None]

    def worst(self, scores_BGE: Tensor, count_BG: Tensor) -> Tensor:
        """bool: the `count` even slots of the highest scores; of equal ones the last, because the first stays."""
        scores_BGE = scores_BGE.masked_fill(~self.even_used(), float("-inf"))
        return take(scores_BGE.flip(-1), count_BG).flip(-1) & self.even_used()

    def without(self, dropped_BGE: Tensor, slots: int) -> Self:
        """The list without some of its even slots, cut to `slots`."""
        gone_BGM = torch.zeros_like(self.place_BGM, dtype=torch.bool)
        gone_BGM[..., 0::2] = dropped_BGE
        stays = torch.sort(gone_BGM.to(torch.uint8), dim=-1, stable=True).indices[..., :slots]
        return type(self)(self.place_BGM.gather(-1, stays), self.n_BG - dropped_BGE.sum(-1))

    def mask(self, places: int) -> Tensor:
        """bool [B, G, S]: what is left."""
        used = torch.arange(self.place_BGM.shape[-1], device=self.n_BG.device) < self.n_BG[..., None]
        left = torch.zeros(*self.n_BG.shape, places, dtype=torch.bool, device=self.n_BG.device)
        return left.scatter(-1, self.place_BGM, used)
