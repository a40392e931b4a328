"""Merging: similar neighbours become one token, their mean, before selection (docs/method.md, "Merging").

After Bolya et al. 2022, "Token Merging", arXiv 2210.09461: a bipartite matching of a fixed size. Here the two sides are
the black and white fields of a chessboard, so that a token can only join one of its four neighbours.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.dedup import CellAssignment
from shirg.features import TokenLayout, VisionFeatures
from shirg.layouts import black_fields, layout_tables
from shirg.scoring import unit
from shirg.selection import Selection, Source, gather_tokens, stable_topk

STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""Right, down, left, up: (rows, columns)."""


@dataclass(frozen=True, eq=False)
class Means:
    """Features in which some tokens are means of several."""

    features: VisionFeatures
    is_mean_BN: Tensor
    box_BN4: Tensor
    """float32: the box of each token; that of a mean lies around the mean of the centres."""

    def mark(self, chosen: Selection) -> Selection:
        """The selection with the means in it marked as merged: index -1 and a box of their own."""
        index_BT = chosen.index_BT.clamp_min(0)
        is_mean_BT = self.is_mean_BN.gather(1, index_BT) & (chosen.index_BT >= 0)
        return replace(
            chosen,
            index_BT=chosen.index_BT.masked_fill(is_mean_BT, -1),
            source_BT=chosen.source_BT.masked_fill(is_mean_BT, int(Source.MERGED)),
            box_BT4=torch.where(is_mean_BT[..., None], gather_tokens(self.box_BN4, index_BT), chosen.box_BT4),
        )


def cell_means(features: VisionFeatures) -> Means:
    """From the features of `dedup.average_cells`: tokens of cells that several tokens share are means."""
    several_M = (layout_tables(features.layout).candidate_MC >= 0).sum(-1) > 1
    is_mean_N = several_M[layout_tables(features.layout).grid_cell_N]
    return Means(features, is_mean_N.expand_as(features.valid_BN), features.box_BN4())


@dataclass(frozen=True, eq=False)
class Merge:
    """Which cells of the finest grid join which neighbour."""

    layout: TokenLayout
    step_BRC: Tensor
    """int64: the neighbour that a cell joins, an index into `STEPS`; -1 where it joins none."""

    def competitors(self, assigned: CellAssignment) -> CellAssignment:
        """The cells without those that joined a neighbour."""
        part, _ = self.layout.finest
        left_BM = assigned.usable_BP[:, part] & (self.step_BRC < 0).flatten(1)
        return replace(assigned, usable_BP=torch.cat([assigned.usable_BP[:, : part.start], left_BM], dim=1))

    def best(self, scores_BP: Tensor) -> Tensor:
        """Scores [B, P] in which each cell has the best of its own score and the scores of those that joined it."""
        part, shape = self.layout.finest
        grid_BRC = torch.unflatten(scores_BP[:, part], 1, shape)
        best_BRC = grid_BRC
        for direction, step in enumerate(STEPS):
            moves_BRC1 = (self.step_BRC == direction)[..., None]
            value_BRC = _shift(torch.where(moves_BRC1, grid_BRC[..., None], 0.0), step)[..., 0]
            has_moved_BRC = _shift(moves_BRC1.float(), step)[..., 0] > 0
            best_BRC = torch.where(has_moved_BRC, torch.maximum(best_BRC, value_BRC), best_BRC)
        return torch.cat([scores_BP[:, : part.start], best_BRC.flatten(1)], dim=1)

    def holds_mean_BN(self) -> Tensor:
        """bool [B, N]: the source tokens of cells that others have joined."""
        part, _ = self.layout.finest
        cell_N = layout_tables(self.layout).grid_cell_N
        on_grid_N: Tensor = cell_N >= part.start
        return (self._size().flatten(1) > 1)[:, (cell_N - part.start).clamp_min(0)] & on_grid_N

    def means(self, features: VisionFeatures, assigned: CellAssignment) -> Means:
        """The features with the mean of each cell and those that joined it; differentiable in the tokens."""
        (part, shape), box_BN4 = self.layout.finest, features.box_BN4()
        grid_cell_N = layout_tables(self.layout).grid_cell_N
        cell_N, on_grid_N = (grid_cell_N - part.start).clamp_min(0), grid_cell_N >= part.start
        size_BRC1 = self._size()
        size_BN1 = size_BRC1.flatten(1, 2)[:, cell_N]

        def mean(values_BND: Tensor) -> Tensor:
            grid_BRCD = torch.unflatten(assigned.take(values_BND.float())[:, part], 1, shape)
            return (self._sum(grid_BRCD) / size_BRC1).flatten(1, 2)[:, cell_N]

        is_mean_BN1 = (size_BN1 > 1) & on_grid_N[:, None]
        centre_BN2 = mean((box_BN4[..., :2] + box_BN4[..., 2:]) / 2)
        # Areas add up; the shape stays that of a cell.
        half_BN2 = (box_BN4[..., 2:] - box_BN4[..., :2]) / 2 * size_BN1.sqrt()
        mean_box_BN4 = torch.cat([centre_BN2 - half_BN2, centre_BN2 + half_BN2], dim=-1)
        tokens = features.tokens_BND
        tokens = torch.where(is_mean_BN1, mean(tokens).to(tokens.dtype), tokens)
        box_BN4 = torch.where(is_mean_BN1, mean_box_BN4, box_BN4)
        return Means(replace(features, tokens_BND=tokens), is_mean_BN1.squeeze(-1), box_BN4)

    def _size(self) -> Tensor:
        """float32 [B, R, C, 1]: of how many cells each is the mean."""
        return self._sum(torch.ones_like(self.step_BRC, dtype=torch.float32)[..., None])

    def _sum(self, grid_BRCD: Tensor) -> Tensor:
        """Sums over each cell and those that joined it."""
        total = grid_BRCD
        for direction, step in enumerate(STEPS):
            total = total + _shift(grid_BRCD * (self.step_BRC == direction)[..., None], step)
        return total


def match_neighbours(layout: TokenLayout, states_BND: Tensor, assigned: CellAssignment, count: int) -> Merge:
    """The `count` most similar pairs: a cell of a white field joins its most similar usable neighbour (a black field).

    Equal similarities go to the first direction and to the first cell in reading order. With fewer usable pairs, fewer
    cells join.
    """
    part, shape = layout.finest
    states_BRCD = torch.unflatten(assigned.take(states_BND)[:, part], 1, shape)
    usable_BRC = torch.unflatten(assigned.usable_BP[:, part], 1, shape)
    b, rows, cols = usable_BRC.shape
    x = torch.stack([unit(states.float()) for states in states_BRCD])
    cosines = []
    for step in STEPS:
        neighbour = _shift(x, (-step[0], -step[1]))
        usable = _shift(usable_BRC[..., None].float(), (-step[0], -step[1]))[..., 0] > 0
        cosines.append((x * neighbour).sum(-1).masked_fill(~(usable & usable_BRC), -2.0))
    cosine_BRCS = torch.stack(cosines, dim=-1)
    best_BRC = cosine_BRCS.amax(-1).masked_fill(black_fields(rows, cols, x.device), -2.0)
    first = torch.arange(len(STEPS), device=x.device)
    step_BRC = torch.where(cosine_BRCS >= cosine_BRCS.amax(-1, keepdim=True), first, len(STEPS)).amin(-1)
    best_BM = best_BRC.flatten(1)
    chosen_BM = torch.zeros_like(best_BM, dtype=torch.bool).scatter(1, stable_topk(best_BM, count), True)
    joins_BRC = (chosen_BM & (best_BM > -2)).view(b, rows, cols)
    return Merge(layout, step_BRC.masked_fill(~joins_BRC, -1))


def _shift(grid_BRCD: Tensor, step: tuple[int, int]) -> Tensor:
    """Each value moved by a step of (rows, columns); zeros fill the edge."""
    down, right = step
    rows, cols = grid_BRCD.shape[1:3]
    pads = (0, 0, max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    padded = F.pad(grid_BRCD, pads)
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + rows, left : left + cols]
