"""Tokens at even distances, like a picture with fewer pixels (docs/method.md, "uniform_grid")."""

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, take
from shirg import Budget, VisionFeatures


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


def dither(cell_N2: Tensor, bits: int = 7) -> Tensor:
    """float32 [N]: when each cell is lit as a picture brightens, in the recursive matrix of side 2 ** bits.

    The bits of (row xor column, row), low ones first, interleaved: neighbours are as far apart in the order as can be.
    """
    row_N, col_N = cell_N2.unbind(-1)
    order_N = torch.zeros_like(row_N)
    for bit in range(bits):
        mixed_N, low_N = ((row_N ^ col_N) >> bit) & 1, (row_N >> bit) & 1
        order_N = order_N | (mixed_N << (2 * (bits - bit) - 1)) | (low_N << (2 * (bits - bit) - 2))
    return order_N.float()
