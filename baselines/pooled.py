"""LaViDa's own pooling, the baseline: its prefix token for token (docs/lavida.md, "Pooling")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg import (
    Pooling,
    Selection,
    Selector,
    Source,
    Stage,
    UserError,
    VisionFeatures,
    join,
    subdivide,
    unpad_bounds,
)


class Pooled(Selector):
    """LaViDa itself: projected views are pooled, tiles are joined, padding is cut, a newline ends each row.

    With its unused slots dropped, the selection is the base model's own sequence, token for token (docs/lavida.md,
    "Pooling" to "Newlines"): the global view without newlines, then the kept rows of the mosaic, each with a newline.
    A picture of a single view is one long row. `merge` "flat" has all views one after the other and no newlines.
    """

    stage: Stage = "post"

    def __init__(self) -> None:
        super().__init__(budget=None)

    def select(self, features: VisionFeatures) -> Selection:
        layout, pooling = features.layout, features.layout.known_pooling
        n, side, p = layout.n_global, layout.side, pooling.side
        if not n:
            raise UserError("Pooled: these features have no view of the whole picture, and the base model pools one")
        tokens_BND = features.tokens_BND.index_select(1, layout.order_N)
        box_BN4 = features.box_BN4()[:, layout.order_N]
        closed = pooling.merge == "spatial_unpad"

        view_BPPD = pool(torch.unflatten(tokens_BND[:, :n], 1, (side, side)), pooling)
        frame_B4 = torch.cat([box_BN4[:, 0, :2], box_BN4[:, n - 1, 2:]], dim=-1)
        one_row_B1CD, box_B1C4 = view_BPPD.flatten(1, 2)[:, None], subdivide(frame_B4, p, p)[:, None]
        everything = torch.ones_like(box_B1C4[..., 0], dtype=torch.bool)
        single = layout.canvas == (0, 0)
        base = rows_of(one_row_B1CD, box_B1C4, everything, newline=closed and single)
        if single:
            return base

        # Canvas cells as (tile row, tile column, row and column in the tile).
        split = (layout.canvas[0] // side, side, layout.canvas[1] // side, side)
        tile_BRCSSD = torch.unflatten(tokens_BND[:, n:], 1, split).transpose(2, 3)
        cell_BRCSS4 = torch.unflatten(box_BN4[:, n:], 1, split).transpose(2, 3)
        frame_BRC4 = torch.cat([cell_BRCSS4[:, :, :, 0, 0, :2], cell_BRCSS4[:, :, :, -1, -1, 2:]], dim=-1)
        pooled = torch.unflatten(pool(tile_BRCSSD.flatten(0, 2), pooling), 0, tile_BRCSSD.shape[:3])
        box = torch.unflatten(subdivide(frame_BRC4, p, p), 3, (p, p))
        if closed:
            pooled, box = (x.transpose(2, 3).flatten(3, 4).flatten(1, 2) for x in (pooled, box))
            mask_BRC = _unpadded(features)
        else:
            pooled, box = (x.flatten(1, 4)[:, None] for x in (pooled, box))
            mask_BRC = torch.ones_like(box[..., 0], dtype=torch.bool)
        return join(base, rows_of(pooled, box, mask_BRC, newline=closed))


def pool(grid_XSSD: Tensor, pooling: Pooling) -> Tensor:
    """Grids [X, S, S, D] shrunk to [X, p, p, D] as the base model does it, in the dtype of the tokens."""
    side, p = grid_XSSD.shape[1], pooling.side
    if p == side:  # the base model does not pool
        return grid_XSSD
    grid_XDSS = grid_XSSD.permute(0, 3, 1, 2)
    if pooling.mode == "bilinear":
        return F.interpolate(grid_XDSS, size=(p, p), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    stride = max(side // p, 1)
    if side // stride != p:
        raise UserError(
            f"{pooling.mode} pooling of {side} x {side} tokens with stride {stride} gives {side // stride} per side, "
            f"not {p}; set the pooled side to {side // stride} or pool bilinearly"
        )
    shrink = F.avg_pool2d if pooling.mode == "average" else F.max_pool2d
    return shrink(grid_XDSS, stride).permute(0, 2, 3, 1)


def rows_of(tokens_BRCD: Tensor, box_BRC4: Tensor, mask_BRC: Tensor, *, newline: bool) -> Selection:
    """A grid of synthesised tokens, row by row; with `newline` a NEWLINE slot ends each row that has a token."""
    source_BRC = torch.full_like(mask_BRC, int(Source.MERGED), dtype=torch.int64)
    if newline:
        y0, y1 = box_BRC4[:, :, -1:, 1], box_BRC4[:, :, -1:, 3]
        edge = torch.ones_like(y0)
        tokens_BRCD = F.pad(tokens_BRCD, (0, 0, 0, 1))
        box_BRC4 = torch.cat([box_BRC4, torch.stack([edge, y0, edge, y1], dim=-1)], dim=2)
        source_BRC = F.pad(source_BRC, (0, 1), value=int(Source.NEWLINE))
        mask_BRC = torch.cat([mask_BRC, mask_BRC.any(-1, keepdim=True)], dim=-1)
    return Selection(
        tokens_BTD=(tokens_BRCD * mask_BRC[..., None].to(tokens_BRCD.dtype)).flatten(1, 2),
        index_BT=torch.full_like(source_BRC, -1).flatten(1),
        source_BT=source_BRC.flatten(1),
        box_BT4=box_BRC4.flatten(1, 2),
        mask_BT=mask_BRC.flatten(1),
    )


def _unpadded(features: VisionFeatures) -> Tensor:
    """bool [B, rows, columns] of the pooled mosaic: False in the padding, which is cut off."""
    layout, p = features.layout, features.layout.known_pooling.side
    top, bottom, left, right = (bound[:, None] for bound in unpad_bounds(layout, features.size_B2))
    row = torch.arange(layout.canvas[0] // layout.side * p, device=top.device)
    col = torch.arange(layout.canvas[1] // layout.side * p, device=top.device)
    row_BR, col_BC = (row >= top) & (row < bottom), (col >= left) & (col < right)
    return row_BR[:, :, None] & col_BC[:, None, :]
