"""Merging neighbours that look the same, before the choice (docs/method.md, "Merging").

After Bolya et al. 2022, "Token Merging", arXiv 2210.09461: a bipartite matching of a fixed size. Here the two sides are
the fields of a chessboard, so that a token can only join one of its four neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.scoring import unit
from shirg.selection import stable_topk

STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""Right, down, left, up: (rows, columns)."""


@dataclass(frozen=True, eq=False)
class Merge:
    """Which cells of a grid join which neighbour."""

    step_BRC: Tensor
    """int64: the direction in which a cell goes, an index into `STEPS`; -1 where it stays."""

    @property
    def gone_BRC(self) -> Tensor:
        return self.step_BRC >= 0

    def pool(self, grid_BRCD: Tensor) -> Tensor:
        """Sums over each cell and those that joined it; differentiable."""
        total = grid_BRCD
        for direction, step in enumerate(STEPS):
            total = total + _arrive(grid_BRCD * (self.step_BRC == direction)[..., None], step)
        return total

    def best(self, grid_BRC: Tensor) -> Tensor:
        """The largest value of each cell and those that joined it."""
        best = grid_BRC
        for direction, step in enumerate(STEPS):
            comes = (self.step_BRC == direction)[..., None]
            value = _arrive(torch.where(comes, grid_BRC[..., None], 0.0), step)[..., 0]
            best = torch.where(_arrive(comes.float(), step)[..., 0] > 0, torch.maximum(best, value), best)
        return best


def match(states_BRCD: Tensor, usable_BRC: Tensor, count: int) -> Merge:
    """The `count` most similar pairs: a cell of a white field joins its most similar usable neighbour (a black field).

    Equal similarities go to the first direction and to the first cell in reading order. With fewer usable pairs, fewer
    cells join.
    """
    b, rows, cols = usable_BRC.shape
    x = torch.stack([unit(states.float()) for states in states_BRCD])
    cosines = []
    for step in STEPS:
        neighbour = _arrive(x, (-step[0], -step[1]))
        usable = _arrive(usable_BRC[..., None].float(), (-step[0], -step[1]))[..., 0] > 0
        cosines.append((x * neighbour).sum(-1).masked_fill(~(usable & usable_BRC), -2.0))
    cosine_BRCS = torch.stack(cosines, dim=-1)
    row, col = torch.arange(rows, device=x.device)[:, None], torch.arange(cols, device=x.device)
    best_BRC = cosine_BRCS.amax(-1).masked_fill((row + col) % 2 == 1, -2.0)
    first = torch.arange(len(STEPS), device=x.device)
    step_BRC = torch.where(cosine_BRCS >= cosine_BRCS.amax(-1, keepdim=True), first, len(STEPS)).amin(-1)
    best_BM = best_BRC.flatten(1)
    chosen_BM = torch.zeros_like(best_BM, dtype=torch.bool).scatter(1, stable_topk(best_BM, count), True)
    goes_BRC = (chosen_BM & (best_BM > -2)).view(b, rows, cols)
    return Merge(step_BRC.masked_fill(~goes_BRC, -1))


def _arrive(grid_BRCD: Tensor, step: tuple[int, int]) -> Tensor:
    """Each value moved by a step of (rows, columns); zeros come in at the edge."""
    down, right = step
    rows, cols = grid_BRCD.shape[1:3]
    pads = (0, 0, max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    padded = F.pad(grid_BRCD, pads)
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + rows, left : left + cols]
