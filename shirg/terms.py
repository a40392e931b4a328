"""The score of a gate: its terms at every place, made comparable and added up (docs/method.md, "Terms")."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, unflatten

from shirg.features import TokenLayout, VisionFeatures
from shirg.kernels import score as kernel
from shirg.knobs import Neighbor, NormScope, Weights
from shirg.scoring import CropTerm, Norm, centre_term, crop_term, neighbour_term, normalise
from shirg.seats import CellAssignment
from shirg.tables import layout_tables
from shirg.texture import EdgeSpace, VarianceOf, channel_variance, edge_term, neighbourhood_variance, pixel_edges

GridTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens [N, D], which of them is at each cell [R, C] and which cells count [R, C] to values [R, C]."""


@dataclass(frozen=True, kw_only=True)
class ScoreTerms:
    """Scores of all places of B pictures."""

    weights: Weights
    neighbor: Neighbor
    variance_of: VarianceOf
    edge_space: EdgeSpace
    norm: Norm
    norm_scope: NormScope
    crop_term: CropTerm

    def score(
        self, features: VisionFeatures, states_BND: Tensor, seats: CellAssignment, ranks_global: Sequence[bool]
    ) -> Tensor:
        """float32 [B, P], padding included, of encoder states.

        Where `ranks_global` is False nobody reads the scores of a picture's global view, and some terms leave it out.
        """
        layout, weights = features.layout, self.weights
        if self._fits_kernel(states_BND):
            score_BP = self._by_kernel(features, states_BND, seats)
        else:
            score_BP = self.relevance_and_neighbours(features, states_BND, seats, ranks_global)
        for weight, values_BP in self._texture(features, states_BND, seats, ranks_global):
            score_BP = score_BP + weight * self._comparable(values_BP, seats, layout)
        if weights.centre:
            centre_BP = centre_term(layout_tables(layout).centre_P2).expand_as(score_BP)
            score_BP = score_BP - weights.centre * self._comparable(centre_BP, seats, layout)
        if self.crop_term != "none":
            table = layout_tables(layout)
            lost_N = crop_term(self.crop_term, table.border_N, table.tile_N, table.in_centre_N)[layout.rank_N]
            score_BP = score_BP - weights.crop * seats.take(lost_N.expand_as(features.valid_BN))
        return score_BP

    def relevance_and_neighbours(
        self, features: VisionFeatures, states_BND: Tensor, seats: CellAssignment, ranks_global: Sequence[bool]
    ) -> Tensor:
        """float32 [B, P]: the two terms of SHIRG-980, which `shirg.kernels.score` has a kernel for."""
        layout, weights = features.layout, self.weights
        score_BP = torch.zeros_like(seats.usable_BP, dtype=torch.float32)
        if weights.similarity:
            assert features.relevance_BN is not None
            relevance_BP = seats.take(features.relevance_BN.float())
            score_BP = score_BP + weights.similarity * self._comparable(relevance_BP, seats, layout)
        if weights.neighbor:
            term = partial(neighbour_term, metric=self.neighbor.metric)
            distance_BP = self._comparable(_on_grids(term, features, states_BND, seats, ranks_global), seats, layout)
            score_BP = score_BP + self.neighbor.sign * weights.neighbor * distance_BP
        return score_BP

    def _fits_kernel(self, states_BND: Tensor) -> bool:
        return (
            states_BND.is_cuda
            and kernel.available()
            and self.weights.neighbor > 0
            and self.neighbor.metric in ("feature_l2", "feature_cos")
            and self.norm in ("zscore", "none")
            and self.norm_scope == "image"
        )

    def _by_kernel(self, features: VisionFeatures, states_BND: Tensor, seats: CellAssignment) -> Tensor:
        layout, weights = features.layout, self.weights
        relevance_BN = features.relevance_BN if weights.similarity else None
        found: Tensor = kernel.relevance_and_neighbours(
            states_BND,
            seats.token_BP,
            seats.usable_BP,
            torch.zeros_like(seats.token_BP).float() if relevance_BN is None else seats.take(relevance_BN.float()),
            layout.n_global,
            layout.side,
            max(layout.canvas[1], 1),
            weights.similarity,
            self.neighbor.sign * weights.neighbor,
            self.neighbor.metric == "feature_cos",
            self.norm == "zscore",
        )
        return found

    def _texture(
        self, features: VisionFeatures, states_BND: Tensor, seats: CellAssignment, ranks_global: Sequence[bool]
    ) -> list[tuple[float, Tensor]]:
        """Weights and values [B, P] of how busy the tokens are."""
        weights = self.weights
        found: list[tuple[float, Tensor]] = []
        if weights.variance and self.variance_of == "channels":
            found.append((weights.variance, seats.take(channel_variance(states_BND))))
        elif weights.variance:
            values_BP = _on_grids(neighbourhood_variance, features, states_BND, seats, ranks_global)
            found.append((weights.variance, values_BP))
        if weights.edge and self.edge_space == "pixels":
            found.append((weights.edge, seats.take(pixel_edges(features.taps["pixels"]))))
        elif weights.edge:
            found.append((weights.edge, _on_grids(edge_term, features, states_BND, seats, ranks_global, by_view=True)))
        return found

    def _comparable(self, values_BP: Tensor, seats: CellAssignment, layout: TokenLayout) -> Tensor:
        """Values on a common scale. The global view is another scale and has statistics of its own."""
        n, usable_BP = layout.n_global, seats.usable_BP
        values_BM, usable_BM = values_BP[:, n:], usable_BP[:, n:]
        parts = [normalise(values_BP[:, :n], usable_BP[:, :n], self.norm)] if n else []
        if layout.canvas != (0, 0) and self.norm_scope == "image":
            parts.append(normalise(values_BM, usable_BM, self.norm))
        elif layout.canvas != (0, 0):
            table, split = layout_tables(layout), (-1, layout.side**2)
            by_tile = [unflatten(part[:, table.by_tile_M], 1, split) for part in (values_BM, usable_BM)]
            parts.append(normalise(by_tile[0], by_tile[1], self.norm).flatten(1)[:, table.from_tile_M])
        return torch.cat(parts, dim=1)


def _on_grids(
    term: GridTerm,
    features: VisionFeatures,
    states_BND: Tensor,
    seats: CellAssignment,
    ranks_global: Sequence[bool],
    *,
    by_view: bool = False,
) -> Tensor:
    """A term of grids at all places [B, P]; zeros stand for a global view that is not ranked.

    One picture at a time: its temporaries stay in cache, and its score cannot depend on its batch-mates. A picture that
    several rows ask about is looked at once, unless who sits in its cells depends on the question.
    """
    at = range(len(ranks_global)) if features.picture_at is None or seats.shared else features.picture_at
    found: dict[int, Tensor] = {}
    for row, (picture, ranks) in enumerate(zip(at, ranks_global, strict=True)):
        if picture not in found:
            of_grid = partial(term, states_BND[row])
            token_P, usable_P = seats.token_BP[row], seats.usable_BP[row]
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

    `by_view` takes each tile as a grid of its own, because a tower that sees one tile knows nothing of the next.
    """

    def on(token_X: Tensor, usable_X: Tensor, shape: tuple[int, int]) -> Tensor:
        return term(unflatten(token_X, 0, shape), unflatten(usable_X, 0, shape)).flatten()

    n, square = layout.n_global, (layout.side, layout.side)
    parts = []
    if n and ranks_global:
        parts.append(on(token_P[:n], usable_P[:n], square))
    elif n:
        parts.append(torch.zeros_like(usable_P[:n], dtype=torch.float32))
    token_M, usable_M = token_P[n:], usable_P[n:]
    if by_view and not layout.overlaps and layout.canvas != (0, 0):
        table = layout_tables(layout)
        tiles = [unflatten(x_M[table.by_tile_M], 0, (-1, layout.side**2)) for x_M in (token_M, usable_M)]
        by_tile = torch.cat([on(token_X, usable_X, square) for token_X, usable_X in zip(*tiles, strict=True)])
        parts.append(by_tile[table.from_tile_M])
    elif layout.canvas != (0, 0):
        parts.append(on(token_M, usable_M, layout.canvas))
    return torch.cat(parts)
