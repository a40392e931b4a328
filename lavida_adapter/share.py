"""A process's share of a training step: which rows of the global batch are its own, and what all must agree on.

Every process draws for the global batch from the same generator and takes its own rows, and the loss is a mean over
the targets of all of them. So a step does not depend on how many processes share it.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Rows rank*b .. (rank+1)*b-1 of world*b; every process has as many. Numbers are agreed on by the CPU's backend."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Self:
        """This process's share in torch's process group; everything where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def rows(self, drawn_G: Tensor) -> Tensor:
        """This process's rows of what was drawn for the global batch."""
        b = len(drawn_G) // self.world
        return drawn_G[self.rank * b : (self.rank + 1) * b]

    def largest(self, n: int) -> int:
        """The largest of all processes' numbers."""
        return n if self.world == 1 else int(self._reduce(n, dist.ReduceOp.MAX))

    def mean(self, n: int) -> float:
        """The mean of all processes' numbers."""
        return n if self.world == 1 else float(self._reduce(n, dist.ReduceOp.SUM)) / self.world

    @staticmethod
    def _reduce(n: int, how: dist.ReduceOp.RedOpType) -> Tensor:
        number = torch.tensor(n)
        dist.all_reduce(number, how)
        return number


SINGLE = Shard()
