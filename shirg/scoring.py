"""The score of SHIRG: its terms, their normalisation and the weighted sum (docs/method.md, "Terms").

Shape letters: B batch, N source tokens, P grid cells, R x C a grid of cells, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, unflatten

from shirg.dedup import CellAssignment
from shirg.features import TokenLayout, VisionFeatures
from shirg.kernels import score as kernel
from shirg.kernels import usable
from shirg.layouts import layout_tables
from shirg.options import CropTerm, Metric, Norm, ShirgOptions
from shirg.validation import UserError

EPS = 1e-6
"""Added to a spread before it divides."""
CLAMP = 3.0
"""Largest absolute z-score."""
ROWS = 18
"""Rows of a grid that are compared at a time on a CPU: they fit its cache."""
EDGES = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Each undirected edge of the 8-neighbourhood once: right, down, down right, down left; (rows, columns)."""


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

    `token_RC` is the token at each cell, 0 to N - 1; `valid_RC` which cells count.

    `feature_l2`: distance of unit tokens, 0 to 2. `feature_cos`: half its square, which is 1 - cosine.
    `position`: distance of cells; the same for every inner token; the literal reading of the notes.
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


def channel_variance(states_XD: Tensor) -> Tensor:
    """Variance [X] over the channels of each token, which is nearly its squared length."""
    return states_XD.float().var(-1, unbiased=False)


def neighbourhood_variance(states_ND: Tensor, token_RC: Tensor, valid_RC: Tensor) -> Tensor:
    """Mean squared deviation [R, C] of unit tokens from the mean of their 3 x 3 window."""
    return neighbour_term(states_ND, token_RC, valid_RC, "local_var")


def edge_term(states_ND: Tensor, token_RC: Tensor, valid_RC: Tensor) -> Tensor:
    """Mean over channels of |sum over the 4 neighbours of (x - neighbour)| [R, C], of unit tokens.

    A neighbour that is missing or not valid counts as equal, so that neither a border nor padding is an edge.
    """
    x_RCD, weight_RC1 = unit_on_grid(states_ND, token_RC), valid_RC[..., None].float()
    total = torch.zeros_like(x_RCD)
    down = (x_RCD[:-1] - x_RCD[1:]) * weight_RC1[:-1] * weight_RC1[1:]
    right = (x_RCD[:, :-1] - x_RCD[:, 1:]) * weight_RC1[:, :-1] * weight_RC1[:, 1:]
    total = total + F.pad(down, (0, 0, 0, 0, 0, 1)) - F.pad(down, (0, 0, 0, 0, 1, 0))
    total = total + F.pad(right, (0, 0, 0, 1)) - F.pad(right, (0, 0, 1, 0))
    return total.abs().mean(-1)


def pixel_edges(patches_X3PP: Tensor) -> Tensor:
    """Mean absolute Laplacian [X] of the grey values inside each patch; patches need at least 3 pixels a side."""
    if patches_X3PP.shape[-1] < 3:
        raise UserError(f"edge_space=pixels: patches of {patches_X3PP.shape[-1]} px are too small; choose features")
    grey = patches_X3PP.float().mean(-3)
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return (4 * inner - around).abs().mean((-2, -1))


def crop_term(kind: CropTerm, border_N: Tensor, tile_N: Tensor, in_centre_N: Tensor) -> Tensor:
    """float32 [N]: how much the position of a token in its crop lowers its score.

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


def normalise(values_BM: Tensor, valid_BM: Tensor, norm: Norm) -> Tensor:
    """Values [B, M] on a common scale, by the statistics of the valid ones of each row.

    `zscore`: zero mean, unit variance, clamped to +-3. `minmax`: 0 to 1. `rank`: 0 to 1 by rank, equal values share the
    middle rank. `none`: unchanged.
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


GridTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From tokens [N, D], the token of each cell [R, C] and which cells count [R, C], to values [R, C]."""


@dataclass(frozen=True)
class ScoreTerms:
    """Scores of all grid cells of B pictures."""

    options: ShirgOptions

    def score(
        self, features: VisionFeatures, states_BND: Tensor, assigned: CellAssignment, ranks_global: Sequence[bool]
    ) -> Tensor:
        """float32 [B, P], padding included, of encoder states.

        Where `ranks_global` is False the scores of a picture's global view are not used, and some terms leave it out.
        """
        layout, weights = features.layout, self.options.weights
        if self._fits_kernel(states_BND):
            score_BP = self._by_kernel(features, states_BND, assigned)
        else:
            score_BP = self.relevance_and_neighbours(features, states_BND, assigned, ranks_global)
        for weight, values_BP in self._texture(features, states_BND, assigned, ranks_global):
            score_BP = score_BP + weight * self._comparable(values_BP, assigned, layout)
        if weights.centre:
            centre_BP = centre_term(layout_tables(layout).centre_P2).expand_as(score_BP)
            score_BP = score_BP - weights.centre * self._comparable(centre_BP, assigned, layout)
        if self.options.crop_term != "none":
            table = layout_tables(layout)
            penalty_N = crop_term(self.options.crop_term, table.border_N, table.tile_N, table.in_centre_N)[
                layout.rank_N
            ]
            score_BP = score_BP - weights.crop * assigned.take(penalty_N.expand_as(features.valid_BN))
        return score_BP

    def relevance_and_neighbours(
        self, features: VisionFeatures, states_BND: Tensor, assigned: CellAssignment, ranks_global: Sequence[bool]
    ) -> Tensor:
        """float32 [B, P]: the two terms of SHIRG-980; `shirg.kernels.score` has a kernel for them."""
        layout, weights = features.layout, self.options.weights
        score_BP = torch.zeros_like(assigned.usable_BP, dtype=torch.float32)
        if weights.similarity:
            assert features.relevance_BN is not None
            relevance_BP = assigned.take(features.relevance_BN.float())
            score_BP = score_BP + weights.similarity * self._comparable(relevance_BP, assigned, layout)
        if weights.neighbour:
            term = partial(neighbour_term, metric=self.options.neighbour.metric)
            distance_BP = self._comparable(
                _on_grids(term, features, states_BND, assigned, ranks_global), assigned, layout
            )
            score_BP = score_BP + self.options.neighbour.sign * weights.neighbour * distance_BP
        return score_BP

    def _fits_kernel(self, states_BND: Tensor) -> bool:
        return (
            states_BND.is_cuda
            and usable(states_BND.device)
            and self.options.weights.neighbour > 0
            and self.options.neighbour.metric in ("feature_l2", "feature_cos")
            and self.options.norm in ("zscore", "none")
            and self.options.norm_scope == "image"
        )

    def _by_kernel(self, features: VisionFeatures, states_BND: Tensor, assigned: CellAssignment) -> Tensor:
        layout, weights = features.layout, self.options.weights
        relevance_BN = features.relevance_BN if weights.similarity else None
        found: Tensor = kernel.relevance_and_neighbours(
            states_BND,
            assigned.token_BP,
            assigned.usable_BP,
            torch.zeros_like(assigned.token_BP).float()
            if relevance_BN is None
            else assigned.take(relevance_BN.float()),
            layout.n_global,
            layout.view_shape[1],
            max(layout.canvas[1], 1),
            weights.similarity,
            self.options.neighbour.sign * weights.neighbour,
            self.options.neighbour.metric == "feature_cos",
            self.options.norm == "zscore",
            EPS,
            CLAMP,
        )
        return found

    def _texture(
        self, features: VisionFeatures, states_BND: Tensor, assigned: CellAssignment, ranks_global: Sequence[bool]
    ) -> list[tuple[float, Tensor]]:
        """Weights and values [B, P] of the variance and edge terms."""
        weights = self.options.weights
        found: list[tuple[float, Tensor]] = []
        if weights.variance and self.options.variance_of == "channels":
            found.append((weights.variance, assigned.take(channel_variance(states_BND))))
        elif weights.variance:
            values_BP = _on_grids(neighbourhood_variance, features, states_BND, assigned, ranks_global)
            found.append((weights.variance, values_BP))
        if weights.edge and self.options.edge_space == "pixels":
            found.append((weights.edge, assigned.take(pixel_edges(features.taps["pixels"]))))
        elif weights.edge:
            found.append(
                (weights.edge, _on_grids(edge_term, features, states_BND, assigned, ranks_global, by_view=True))
            )
        return found

    def _comparable(self, values_BP: Tensor, assigned: CellAssignment, layout: TokenLayout) -> Tensor:
        """Values on a common scale. The global view has another scale, and so its own statistics."""
        n, usable_BP = layout.n_global, assigned.usable_BP
        values_BM, usable_BM = values_BP[:, n:], usable_BP[:, n:]
        parts = [normalise(values_BP[:, :n], usable_BP[:, :n], self.options.norm)] if n else []
        if layout.canvas != (0, 0) and self.options.norm_scope == "image":
            parts.append(normalise(values_BM, usable_BM, self.options.norm))
        elif layout.canvas != (0, 0):
            table, split = layout_tables(layout), (-1, layout.view_tokens)
            by_tile = [unflatten(part[:, table.by_tile_M], 1, split) for part in (values_BM, usable_BM)]
            parts.append(normalise(by_tile[0], by_tile[1], self.options.norm).flatten(1)[:, table.from_tile_M])
        return torch.cat(parts, dim=1)


def _on_grids(
    term: GridTerm,
    features: VisionFeatures,
    states_BND: Tensor,
    assigned: CellAssignment,
    ranks_global: Sequence[bool],
    *,
    by_view: bool = False,
) -> Tensor:
    """A term of grids at all cells [B, P]; zeros for a global view that is not ranked.

    One picture at a time: its temporaries stay in the CPU's cache, and its score cannot depend on the other pictures of
    the batch. A picture that several rows share is computed once, unless its cell assignment depends on the question.
    """
    at = range(len(ranks_global)) if features.picture_at is None or assigned.shared else features.picture_at
    found: dict[int, Tensor] = {}
    for row, (picture, ranks) in enumerate(zip(at, ranks_global, strict=True)):
        if picture not in found:
            of_grid = partial(term, states_BND[row])
            token_P, usable_P = assigned.token_BP[row], assigned.usable_BP[row]
            found[picture] = _on_grids_of_one(of_grid, token_P, usable_P, features.layout, ranks, by_view)
    return torch.stack([found[picture] for picture in at])


def _on_grids_of_one(
    term: Callable[[Tensor, Tensor], Tensor],
    token_P: Tensor,
    usable_P: Tensor,
    layout: TokenLayout,
    ranks_global: bool,
    by_view: bool,
) -> Tensor:
    """The global view and the canvas are two grids.

    `by_view` makes each tile its own grid, because the tower encodes each tile alone.
    """

    def on(token_X: Tensor, usable_X: Tensor, shape: tuple[int, int]) -> Tensor:
        return term(unflatten(token_X, 0, shape), unflatten(usable_X, 0, shape)).flatten()

    n, view = layout.n_global, layout.view_shape
    parts = []
    if n and ranks_global:
        parts.append(on(token_P[:n], usable_P[:n], view))
    elif n:
        parts.append(torch.zeros_like(usable_P[:n], dtype=torch.float32))
    token_M, usable_M = token_P[n:], usable_P[n:]
    if by_view and not layout.overlaps and layout.canvas != (0, 0):
        table = layout_tables(layout)
        tiles = [unflatten(x_M[table.by_tile_M], 0, (-1, layout.view_tokens)) for x_M in (token_M, usable_M)]
        by_tile = torch.cat([on(token_X, usable_X, view) for token_X, usable_X in zip(*tiles, strict=True)])
        parts.append(by_tile[table.from_tile_M])
    elif layout.canvas != (0, 0):
        parts.append(on(token_M, usable_M, layout.canvas))
    return torch.cat(parts)
