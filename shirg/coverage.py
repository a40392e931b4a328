"""What stands for tokens that were not kept: the scaffold in front, the summary at the end.

docs/method.md, "Scaffold" and "Summary".
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from shirg.features import VisionFeatures
from shirg.geometry import area_weights, subdivide
from shirg.seats import CellAssignment
from shirg.selection import Selection, Source, assert_finite

ScaffoldSource = Literal["global", "canvas"]


def scaffold_tokens(features: VisionFeatures, seats: CellAssignment, size: int, source: ScaffoldSource) -> Selection:
    """size x size means of source tokens over windows that partition the global view or the canvas, row by row.

    A token on a boundary is shared by area. Invalid tokens weigh nothing; a window without any valid token is an unused
    slot. Means are taken in float32 and returned in the dtype of the tokens.
    """
    layout, n = features.layout, features.layout.n_global
    rows, cols = (layout.side, layout.side) if source == "global" else layout.canvas
    if size > min(rows, cols):
        raise ValueError(
            f"scaffold.size={size} with source={source}: this layout has only {rows} x {cols} tokens there; "
            f"choose at most {min(rows, cols)}" + ("" if rows else " or source=global, the only view there is")
        )
    part = slice(n) if source == "global" else slice(n, None)
    there = replace(seats, token_BP=seats.token_BP[:, part], usable_BP=seats.usable_BP[:, part])
    weight_BRC1 = torch.unflatten(there.usable_BP.float(), 1, (rows, cols))[..., None]
    tokens_BRCD = torch.unflatten(there.take(features.tokens_BND).float(), 1, (rows, cols))
    area_B = _pool(weight_BRC1, size)
    mean_B = _pool(tokens_BRCD * weight_BRC1, size) / area_B.clamp_min(1e-9)
    box_BM4 = there.take(features.box_BN4())
    frame_B4 = torch.cat([box_BM4[:, 0, :2], box_BM4[:, -1, 2:]], dim=-1)
    mask_BS = area_B.flatten(1) > 0
    assert_finite(mean_B.detach().sum(-1).flatten(1), mask_BS, "the scaffold")
    return Selection(
        tokens_BTD=mean_B.flatten(1, 2).to(features.tokens_BND.dtype),
        index_BT=torch.full_like(mask_BS, -1, dtype=torch.int64),
        source_BT=torch.full_like(mask_BS, int(Source.SCAFFOLD), dtype=torch.int64),
        box_BT4=subdivide(frame_B4, size, size),
        mask_BT=mask_BS,
    )


def _pool(grid_BRCD: Tensor, size: int) -> Tensor:
    """Area means [B, size, size, D] of a grid, one axis after the other."""
    rows, cols = grid_BRCD.shape[1:3]
    by_row = area_weights(rows, size, grid_BRCD.device)
    by_col = area_weights(cols, size, grid_BRCD.device)
    return torch.matmul(by_col, torch.unflatten(by_row @ grid_BRCD.flatten(2), -1, grid_BRCD.shape[2:]))


def summary_token(features: VisionFeatures, usable_BN: Tensor, taken_BN: Tensor) -> Selection:
    """One token per picture: the mean of all usable tokens that were not taken, or of all usable ones if none is left.

    The mean is taken in float32 and returned in the dtype of the tokens; its box is the whole picture.
    """
    left_BN = usable_BN & ~taken_BN
    left_BN = torch.where(left_BN.any(-1, keepdim=True), left_BN, usable_BN)
    # In reading order, so that the rounding of the sum does not depend on how the views are numbered.
    order_N = features.layout.order_N
    weight_BN = left_BN.float() / left_BN.sum(-1, keepdim=True).clamp_min(1)
    mean_B1D = weight_BN[:, order_N][:, None] @ features.tokens_BND[:, order_N].float()
    mask_B1 = left_BN.any(-1, keepdim=True)
    return Selection(
        tokens_BTD=mean_B1D.to(features.tokens_BND.dtype),
        index_BT=torch.full_like(mask_B1, -1, dtype=torch.int64),
        source_BT=torch.full_like(mask_B1, int(Source.SUMMARY), dtype=torch.int64),
        box_BT4=torch.tensor([0.0, 0.0, 1.0, 1.0], device=mask_B1.device).expand(len(mask_B1), 1, 4),
        mask_BT=mask_B1,
    )
