"""The terms of a SHIRG score, and how they are made comparable (docs/method.md, "Terms").

Everything here is float32 and works on grids or rows of one picture after the other, so that no score can depend on the
other pictures of a batch.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["feature_l2", "feature_cos", "local_var", "position"]
Norm = Literal["zscore", "minmax", "rank", "none"]
CropTerm = Literal["none", "border", "centre", "literal"]

EPS = 1e-6
CLAMP = 3.0
ROWS = 18
"""Rows of a grid that are compared at a time on a CPU: few enough to stay in its cache, in few enough calls."""
# Each undirected edge of the 8-neighbourhood once: right, down, down right, down left.
EDGES = ((0, 1), (1, 0), (1, 1), (1, -1))


def unit(tokens_XD: Tensor) -> Tensor:
    """Tokens scaled to length 1; a zero token stays zero, one whose length overflows becomes NaN."""
    return tokens_XD / _length(tokens_XD)


def unit_on_grid(tokens_ND: Tensor, token_RC: Tensor) -> Tensor:
    """float32 [R, C, D]: a copy of the tokens at the cells of a grid, scaled to length 1 in place."""
    copy_RCD = torch.unflatten(tokens_ND.index_select(0, token_RC.flatten()).float(), 0, token_RC.shape)
    return copy_RCD.div_(_length(copy_RCD))


def _length(tokens_XD: Tensor) -> Tensor:
    norm_X1: Tensor = torch.linalg.vector_norm(tokens_XD, dim=-1, keepdim=True)
    return norm_X1.masked_fill(norm_X1.isinf(), float("nan")).masked_fill(norm_X1 == 0, 1.0)


def neighbour_term(tokens_ND: Tensor, token_RC: Tensor, valid_RC: Tensor, metric: Metric) -> Tensor:
    """Mean distance [R, C] of each token of a grid to its existing, valid 8-neighbours; 0 where it has none.

    `token_RC` says which of the N tokens is at each cell, `valid_RC` which cells count.

    `feature_l2`: distance of unit tokens, 0 to 2. `feature_cos`: half its square, which is 1 - cosine.
    `position`: distance of cells; the same for every inner token, kept as the literal reading of the notes.
    `local_var`: mean squared deviation over channels from the mean of the 3 x 3 window.
    """
    if metric == "local_var":
        return _local_variance(unit_on_grid(tokens_ND, token_RC), valid_RC)
    weight_RC = valid_RC.float()
    total_RC, count_RC = torch.zeros_like(weight_RC), torch.zeros_like(weight_RC)
    for (down, right), distance in zip(EDGES, _edge_distances(tokens_ND, token_RC, metric), strict=True):
        both = torch.mul(*_ends(weight_RC[..., None], down, right)).squeeze(-1)
        for pad in _pads(down, right):
            total_RC = total_RC + F.pad(distance * both, pad)
            count_RC = count_RC + F.pad(both, pad)
    return total_RC / count_RC.clamp_min(1)


def _edge_distances(tokens_ND: Tensor, token_RC: Tensor, metric: Metric) -> list[Tensor]:
    """The distance of both ends of each edge, one grid for each direction of EDGES."""
    rows, cols = token_RC.shape
    if metric == "position":
        shapes = [(rows - down, cols - abs(right)) for down, right in EDGES]
        far = [(down * down + right * right) ** 0.5 for down, right in EDGES]
        return [torch.full(shape, d, device=tokens_ND.device) for shape, d in zip(shapes, far, strict=True)]
    step = ROWS if tokens_ND.device.type == "cpu" else rows
    parts: list[list[Tensor]] = [[] for _ in EDGES]
    for first in range(0, rows, step):
        # One row more, for the edges that lead out of the block; the edges inside that row are the next block's.
        block_RCD = unit_on_grid(tokens_ND, token_RC[first : first + step + 1])
        for part, (down, right) in zip(parts, EDGES, strict=True):
            a, b = _ends(block_RCD if down else block_RCD[:step], down, right)
            # A difference, not a dot product: exact for equal tokens, where 2 - 2 cos would leave rounding noise that
            # the z-score then blows up; and on a CPU no slower than banded matrix products.
            part.append(torch.linalg.vector_norm(a - b, dim=-1))
    distances = [torch.cat(part) for part in parts]
    return [d.square() / 2 for d in distances] if metric == "feature_cos" else distances


def _ends(grid_RCD: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Both ends of every edge of one direction."""
    rows, cols = grid_RCD.shape[:2]
    left, leftmost = max(right, 0), max(-right, 0)
    return grid_RCD[: rows - down, leftmost : cols - left], grid_RCD[down:, left : cols - leftmost]


def _pads(down: int, right: int) -> tuple[list[int], list[int]]:
    """How to put a value of each edge back to its first and to its second end."""
    left, leftmost = max(right, 0), max(-right, 0)
    return [leftmost, left, 0, down], [left, leftmost, down, 0]


def _local_variance(x_RCD: Tensor, valid_RC: Tensor) -> Tensor:
    weight_RC1 = valid_RC[..., None].float()
    count_RC1 = _window_sum(weight_RC1).clamp_min(1)
    mean_RCD = _window_sum(x_RCD * weight_RC1) / count_RC1
    return (x_RCD - mean_RCD).square().mean(-1) * weight_RC1[..., 0]


def _window_sum(grid_RCD: Tensor) -> Tensor:
    """Sum over the 3 x 3 window around each cell, nothing outside the grid."""
    tall = F.pad(grid_RCD, (0, 0, 0, 0, 1, 1))
    tall = tall[:-2] + tall[1:-1] + tall[2:]
    wide = F.pad(tall, (0, 0, 1, 1))
    return wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]


def normalise(values_BM: Tensor, valid_BM: Tensor, norm: Norm) -> Tensor:
    """Values [B, M] on a common scale, by the statistics of the valid ones of each row.

    `zscore`: zero mean, unit variance, clamped to +-3. `minmax`: 0 to 1. `rank`: 0 to 1 by rank, equal values share the
    middle rank. `none`: as they are.
    """
    values_BM = values_BM.float()
    if norm == "none":
        return values_BM
    weight_BM = valid_BM.float()
    count_B1 = weight_BM.sum(-1, keepdim=True).clamp_min(1)
    if norm == "zscore":
        mean_B1 = (values_BM * weight_BM).sum(-1, keepdim=True) / count_B1
        centred_BM = values_BM - mean_B1
        std_B1 = ((centred_BM.square() * weight_BM).sum(-1, keepdim=True) / count_B1).sqrt()
        return (centred_BM / (std_B1 + EPS)).clamp(-CLAMP, CLAMP)
    above_BM = values_BM.masked_fill(~valid_BM, float("inf"))
    if norm == "minmax":
        low_B1 = above_BM.amin(-1, keepdim=True)
        high_B1 = values_BM.masked_fill(~valid_BM, float("-inf")).amax(-1, keepdim=True)
        scaled_BM = (values_BM - low_B1) / (high_B1 - low_B1 + EPS)
        return scaled_BM.where(valid_BM, torch.zeros_like(scaled_BM))
    sorted_BM = above_BM.sort(-1).values
    below = torch.searchsorted(sorted_BM, values_BM.contiguous(), right=False)
    up_to = torch.searchsorted(sorted_BM, values_BM.contiguous(), right=True)
    return (below + up_to - 1).float() / 2 / (count_B1 - 1).clamp_min(1)


def crop_term(kind: CropTerm, border_N: Tensor, tile_N: Tensor, in_centre_N: Tensor) -> Tensor:
    """float32 [N]: what a token loses for where it sits in its crop.

    `border`: 1 at the border of its own view, falling to 0 half a view inwards. `centre`: 0 in the centre crop, 1
    elsewhere. `literal`: |number - 2| / 2 for the number of its view, row by row with a centre crop last: the notes'
    formula.
    """
    if kind == "border":
        return border_N
    if kind == "centre":
        return (~in_centre_N).float()
    if kind == "literal":
        return ((tile_N - 2).abs() / 2).masked_fill(tile_N < 0, 0.0)
    return torch.zeros_like(border_N)


def centre_term(centre_P2: Tensor) -> Tensor:
    """float32 [P]: distance from the centre of the frame, 1 at its corners."""
    distance_P: Tensor = torch.linalg.vector_norm(centre_P2 - 0.5, dim=-1) * 2**0.5
    return distance_P
