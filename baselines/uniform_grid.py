"""Tokens at even distances, like a picture with fewer pixels (docs/method.md, "uniform_grid")."""

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, take
from shirg import Budget, VisionFeatures, dither


class UniformGrid(GroupSelector):
    """Spreads the budget over each view by the order of an ordered dither (Bayer's), which is even at every count.

    A quarter of the tokens is every second one of every second row. A control: it never looks at the content, so a
    method that works because of *what* it keeps must do better.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or one order over all tokens, with one matrix on the canvas and the global view.
    """

    def __init__(self, *, budget: Budget, scope: Scope = "per_view") -> None:
        super().__init__(budget=budget, scope=scope)

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        cell_N2 = features.layout.cell_N2
        if self.scope == "per_view":
            (row_N, col_N), (rows, cols) = cell_N2.unbind(-1), features.layout.view_shape
            cell_N2 = torch.stack([row_N % rows, col_N % cols], dim=-1)
        order_BGS = -dither(cell_N2)[groups.index_GS].expand(groups.valid_BGS.shape)
        return take(order_BGS.masked_fill(~groups.valid_BGS, -torch.inf), groups.quota_BG), None
