"""The score of a gate: its terms at every place, made comparable and added up (docs/method.md, "Terms")."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, unflatten

from shirg.knobs import Neighbor, NormScope, Weights
from shirg.scoring import CropTerm, Norm, centre_term, crop_term, neighbour_term, normalise
from shirg.seats import Seats
from shirg.selection import TokenLayout, VisionFeatures
from shirg.tables import tables
from shirg.texture import EdgeSpace, VarianceOf, channel_variance, edge_term, neighbourhood_variance, pixel_edges

GridTerm = Callable[[Tensor, Tensor], Tensor]
"""Tokens [R, C, D] and validity [R, C] of a grid to values [R, C]."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Scores of all places of B pictures."""

    weights: Weights
    neighbor: Neighbor
    variance_of: VarianceOf
    edge_space: EdgeSpace
    norm: Norm
    norm_scope: NormScope
    crop_term: CropTerm

    def score(self, features: VisionFeatures, states_BND: Tensor, seats: Seats) -> Tensor:
        """float32 [B, P], padding included, of encoder states."""
        layout, weights = features.layout, self.weights
        score_BP = torch.zeros_like(seats.usable_BP, dtype=torch.float32)
        if weights.similarity:
            assert features.relevance_BN is not None
            relevance_BP = seats.take(features.relevance_BN.float())
            score_BP = score_BP + weights.similarity * self._comparable(relevance_BP, seats, layout)
        for weight, values_BP in self._local(features, states_BND, seats):
            score_BP = score_BP + weight * self._comparable(values_BP, seats, layout)
        if weights.centre:
            centre_BP = centre_term(tables(layout).centre_P2).expand_as(score_BP)
            score_BP = score_BP - weights.centre * self._comparable(centre_BP, seats, layout)
        if self.crop_term != "none":
            table = tables(layout)
            lost_N = crop_term(self.crop_term, table.border_N, table.tile_N, table.in_centre_N)[layout.rank_N]
            score_BP = score_BP - weights.crop * seats.take(lost_N.expand_as(features.valid_BN))
        return score_BP

    def _local(self, features: VisionFeatures, states_BND: Tensor, seats: Seats) -> list[tuple[float, Tensor]]:
        """Weights, with their signs, and values [B, P] of the terms that look at the tokens themselves."""
        weights, layout = self.weights, features.layout
        found: list[tuple[float, Tensor]] = []
        if weights.neighbor:
            metric = self.neighbor.metric
            values = _on_grids(states_BND, seats, layout, lambda x, valid: neighbour_term(x, valid, metric))
            found.append((self.neighbor.sign * weights.neighbor, values))
        if weights.variance and self.variance_of == "channels":
            found.append((weights.variance, seats.take(channel_variance(states_BND))))
        elif weights.variance:
            found.append((weights.variance, _on_grids(states_BND, seats, layout, neighbourhood_variance)))
        if weights.edge and self.edge_space == "pixels":
            found.append((weights.edge, seats.take(pixel_edges(features.taps["pixels"]))))
        elif weights.edge:
            found.append((weights.edge, _on_grids(states_BND, seats, layout, edge_term, by_view=True)))
        return found

    def _comparable(self, values_BP: Tensor, seats: Seats, layout: TokenLayout) -> Tensor:
        """Values on a common scale. The global view is another scale and has statistics of its own."""
        n, usable_BP = layout.n_global, seats.usable_BP
        values_BM, usable_BM = values_BP[:, n:], usable_BP[:, n:]
        parts = [normalise(values_BP[:, :n], usable_BP[:, :n], self.norm)] if n else []
        if layout.canvas != (0, 0) and self.norm_scope == "image":
            parts.append(normalise(values_BM, usable_BM, self.norm))
        elif layout.canvas != (0, 0):
            table, split = tables(layout), (-1, layout.side**2)
            by_tile = [unflatten(part[:, table.by_tile_M], 1, split) for part in (values_BM, usable_BM)]
            parts.append(normalise(by_tile[0], by_tile[1], self.norm).flatten(1)[:, table.from_tile_M])
        return torch.cat(parts, dim=1)


def _on_grids(
    states_BND: Tensor, seats: Seats, layout: TokenLayout, term: GridTerm, *, by_view: bool = False
) -> Tensor:
    """A term of grids at all places [B, P]: the global view and the canvas are two grids.

    `by_view` takes each tile as a grid of its own, because a tower that sees one tile knows nothing of the next.
    One picture at a time: its temporaries stay in cache, and its score cannot depend on its batch-mates.
    """
    n, side = layout.n_global, layout.side
    table = tables(layout)
    rows = []
    for picture, states_ND in enumerate(states_BND):
        states_PD, usable_P = seats.take_one(states_ND, picture), seats.usable_BP[picture]
        square = (side, side)
        parts = [term(unflatten(states_PD[:n], 0, square), unflatten(usable_P[:n], 0, square))] if n else []
        states_MD, usable_M = states_PD[n:], usable_P[n:]
        if by_view and not layout.overlaps and layout.canvas != (0, 0):
            split = (-1, side, side)
            tiles = zip(
                unflatten(states_MD[table.by_tile_M], 0, split),
                unflatten(usable_M[table.by_tile_M], 0, split),
                strict=True,
            )
            by_tile = torch.cat([term(x, usable).flatten() for x, usable in tiles])
            parts.append(by_tile[table.from_tile_M])
        elif layout.canvas != (0, 0):
            parts.append(term(unflatten(states_MD, 0, layout.canvas), unflatten(usable_M, 0, layout.canvas)))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)
