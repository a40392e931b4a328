"""Deduplication: where crops overlap, picks one token per canvas cell (docs/method.md, "Duplicates").

How many tokens fall on a cell follows from the geometry alone; which of them is best depends on the picture.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shirg.features import TokenLayout, VisionFeatures
from shirg.layouts import layout_tables
from shirg.options import Dedup
from shirg.selection import gather_tokens


@dataclass(frozen=True, eq=False)
class CellAssignment:
    """The token of each of the P grid cells of B pictures: the cells of the global view, then those of the canvas."""

    token_BP: Tensor
    """int64: the source token of each cell."""
    usable_BP: Tensor
    """bool: False where the token may neither be kept nor counted."""
    shared: bool
    """Whether cells have several tokens, of which one was chosen for each picture."""

    def take(self, values_BN: Tensor) -> Tensor:
        """Values of tokens [B, N, ...] at the cells that they are assigned to [B, P, ...]."""
        if not self.shared:
            return values_BN.index_select(1, self.token_BP[0])
        index = self.token_BP.view(*self.token_BP.shape, *[1] * (values_BN.ndim - 2))
        return values_BN.gather(1, index.expand(-1, -1, *values_BN.shape[2:]))


def assign_cells(layout: TokenLayout, usable_BN: Tensor, relevance_BN: Tensor | None, dedup: Dedup) -> CellAssignment:
    """Assigns one of its tokens to each canvas cell: the most relevant, or ("border") the one deepest inside its view.

    Equal relevance goes to the token deeper inside its view, then to the earlier view. "mean" needs features of
    `average_cells`, in which all tokens of a cell are equal.
    """
    b, n = len(usable_BN), layout.n_global
    if not layout.overlaps:
        return CellAssignment(layout.order_N.expand(b, -1), usable_BN.index_select(1, layout.order_N), shared=False)
    candidate_MC = layout_tables(layout).candidate_MC
    columns = candidate_MC.shape[1]
    if dedup == "relevance" and relevance_BN is not None:
        present_MC = candidate_MC >= 0
        worth_BMC = relevance_BN.float()[:, candidate_MC.clamp_min(0)].masked_fill(~present_MC, float("-inf"))
        # The first of the best, on every device: of the best columns the one with the most columns after it.
        first = torch.arange(columns, 0, -1, device=candidate_MC.device)
        is_best = (worth_BMC >= worth_BMC.amax(-1, keepdim=True)) & present_MC
        column_BM = columns - torch.where(is_best, first, 0).amax(-1)
        # NaN never wins here; assert_finite reports it later.
        column_BM = column_BM.clamp_max(columns - 1)
        winner_BM = candidate_MC.expand(b, -1, -1).gather(2, column_BM[..., None]).squeeze(-1)
        winner_BM = torch.where(winner_BM < 0, candidate_MC[:, 0], winner_BM)
    else:
        winner_BM = candidate_MC[:, 0].expand(b, -1)
    token_BP = torch.cat([layout.order_N[:n].expand(b, -1), winner_BM.clamp_min(0)], dim=1)
    usable_BP = usable_BN.gather(1, token_BP)
    usable_BP[:, n:] &= winner_BM >= 0
    return CellAssignment(token_BP, usable_BP, shared=True)


def average_cells(features: VisionFeatures) -> VisionFeatures:
    """Features in which each token is the mean of all tokens of its cell, relevance and taps included."""

    def mean(values_BND: Tensor) -> Tensor:
        flat = values_BND.flatten(2).float()
        total = sum_cells(flat, features.layout) / cell_counts(features.layout)[:, None]
        return gather_rows(total, layout_tables(features.layout).grid_cell_N).to(values_BND.dtype).view_as(values_BND)

    relevance = features.relevance_BN
    return replace(
        features,
        tokens_BND=mean(features.tokens_BND),
        relevance_BN=None if relevance is None else mean(relevance[..., None])[..., 0],
        taps={name: mean(tap if tap.ndim > 2 else tap[..., None]).view_as(tap) for name, tap in features.taps.items()},
    )


def cell_counts(layout: TokenLayout) -> Tensor:
    """float32 [P]: how many tokens a cell has, at least 1."""
    per_cell = (layout_tables(layout).candidate_MC >= 0).sum(-1).float()
    return torch.cat([per_cell.new_ones(layout.n_global), per_cell.clamp_min(1)])


def sum_cells(values_BND: Tensor, layout: TokenLayout) -> Tensor:
    """Sums [B, P, D] over the tokens of each cell, in a fixed order."""
    candidate_MC = layout_tables(layout).candidate_MC
    total = values_BND.new_zeros(len(values_BND), len(candidate_MC), values_BND.shape[-1])
    for column in range(candidate_MC.shape[1]):
        token_M = candidate_MC[:, column]
        total = total + gather_rows(values_BND, token_M.clamp_min(0)) * (token_M >= 0)[:, None]
    return torch.cat([gather_rows(values_BND, layout.order_N[: layout.n_global]), total], dim=1)


def gather_rows(values_BND: Tensor, index_K: Tensor) -> Tensor:
    """The same K rows of every picture, [B, K, D]."""
    return gather_tokens(values_BND, index_K.expand(len(values_BND), -1))
