"""The scaffold: a coarse picture that is always there (docs/method.md, "Scaffold")."""

from typing import Literal

import torch
from torch import Tensor

from shirg.geometry import area_weights, subdivide
from shirg.selection import Selection, Source, VisionFeatures

ScaffoldSource = Literal["global", "canvas"]


def scaffold_tokens(features: VisionFeatures, valid_BN: Tensor, size: int, source: ScaffoldSource) -> Selection:
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
    places = layout.order_N[:n] if source == "global" else layout.order_N[n:]
    weight_BRC1 = torch.unflatten(valid_BN[:, places].float(), 1, (rows, cols))[..., None]
    tokens_BRCD = torch.unflatten(features.tokens_BND.index_select(1, places).float(), 1, (rows, cols))
    area_B = _pool(weight_BRC1, size)
    mean_B = _pool(tokens_BRCD * weight_BRC1, size) / area_B.clamp_min(1e-9)
    box_BM4 = features.box_BN4()[:, places]
    frame_B4 = torch.cat([box_BM4[:, 0, :2], box_BM4[:, -1, 2:]], dim=-1)
    mask_BS = area_B.flatten(1) > 0
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
