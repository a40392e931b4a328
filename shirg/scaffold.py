"""Tokens added beside the selected ones: scaffold, summary token, newlines (docs/method.md, "Scaffold", "Summary")."""

from dataclasses import replace

import torch
from torch import Tensor

from shirg.dedup import CellAssignment
from shirg.features import TokenLayout, VisionFeatures
from shirg.layouts import area_weights, layout_tables, subdivide
from shirg.options import ScaffoldSource
from shirg.selection import Selection, Source, gather_tokens
from shirg.validation import UserError, assert_finite


def scaffold_tokens(features: VisionFeatures, assigned: CellAssignment, size: int, source: ScaffoldSource) -> Selection:
    """size x size means of source tokens over windows that partition the global view or the canvas, row by row.

    A token on a boundary is shared by area. Unusable tokens have no weight; a window without any usable token is an
    unused slot. Means are taken in float32 and returned in the dtype of the tokens.
    """
    layout, n = features.layout, features.layout.n_global
    if source == "global" and not n:
        raise UserError(
            "scaffold.source=global: these features have no view of the whole picture; choose source 'canvas', or "
            "size 0 for no scaffold"
        )
    rows, cols = layout.view_shape if source == "global" else layout.canvas
    if size > min(rows, cols):
        raise UserError(
            f"scaffold.size={size} with source={source}: this layout has only {rows} x {cols} tokens there; "
            f"choose at most {min(rows, cols)}" + ("" if rows else " or source=global, the only view there is")
        )
    part = slice(n) if source == "global" else slice(n, None)
    grid = replace(assigned, token_BP=assigned.token_BP[:, part], usable_BP=assigned.usable_BP[:, part])
    weight_BRC1 = torch.unflatten(grid.usable_BP.float(), 1, (rows, cols))[..., None]
    tokens_BRCD = torch.unflatten(grid.take(features.tokens_BND).float(), 1, (rows, cols))
    area_B = _pool(weight_BRC1, size)
    mean_B = _pool(tokens_BRCD * weight_BRC1, size) / area_B.clamp_min(1e-9)
    box_BM4 = grid.take(features.box_BN4())
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


def summary_token(features: VisionFeatures, usable_BN: Tensor, kept: Selection) -> Selection:
    """One token per picture: the mean of all usable tokens that were not kept, or of all usable ones if none is left.

    The mean is taken in float32 and returned in the dtype of the tokens; its box is the whole picture.
    """
    # Unused slots, which have the index -1, are marked in one more column.
    b, n = usable_BN.shape
    marked = torch.zeros(b, n + 1, dtype=torch.bool, device=usable_BN.device).scatter(1, kept.index_BT + 1, True)
    left_BN = usable_BN & ~marked[:, 1:]
    left_BN = torch.where(left_BN.any(-1, keepdim=True), left_BN, usable_BN)
    # In reading order, so that the rounding of the sum does not depend on how the views are numbered.
    order_N = features.layout.order_N
    weight_BN = left_BN.float() / left_BN.sum(-1, keepdim=True).clamp_min(1)
    mean_B1D = weight_BN[:, order_N][:, None] @ features.tokens_BND[:, order_N].float()
    mask_B1 = left_BN.any(-1, keepdim=True)
    whole_4 = (torch.arange(4, device=mask_B1.device) >= 2).float()  # made there: a copy would wait for the device
    return Selection(
        tokens_BTD=mean_B1D.to(features.tokens_BND.dtype),
        index_BT=torch.full_like(mask_B1, -1, dtype=torch.int64),
        source_BT=torch.full_like(mask_B1, int(Source.SUMMARY), dtype=torch.int64),
        box_BT4=whole_4.expand(len(mask_B1), 1, 4),
        mask_BT=mask_B1,
    )


def used_rows(layout: TokenLayout, valid_BN: Tensor) -> Tensor:
    """bool [B, R]: which canvas rows hold a valid token; one row that is always used where there is no canvas."""
    if layout.canvas == (0, 0):
        return torch.ones_like(valid_BN[:, :1])
    if not layout.overlaps:
        canvas_BM = valid_BN[:, layout.order_N[layout.n_global :]]
        return torch.unflatten(canvas_BM, 1, layout.canvas).any(-1)
    in_row_RN = layout_tables(layout).row_N == torch.arange(layout.canvas[0], device=valid_BN.device)[:, None]
    return (valid_BN[:, None] & in_row_RN).any(-1)


def close_rows(kept: Selection, features: VisionFeatures, rows_BR: Tensor) -> Selection:
    """Kept tokens in reading order with a NEWLINE slot at the end of each canvas row, unused where `rows_BR` is False.

    Without a canvas there is one newline, after the last token.
    """
    layout, n = features.layout, features.layout.n_tokens
    last_R = layout_tables(layout).row_end_R
    if layout.canvas == (0, 0):
        last_R = torch.full((1,), layout.n_global - 1, device=rows_BR.device)
    # Twice the rank in reading order, so that a row end fits between the last token of its row and the next row.
    rank_BT = 2 * layout.rank_N[kept.index_BT.clamp_min(0)]
    end_BR = (2 * last_R + 1).expand_as(rows_BR)
    mask = torch.cat([kept.mask_BT, rows_BR], dim=1)
    rank = torch.cat([rank_BT, end_BR], dim=1).masked_fill(~mask, 2 * n)
    order = torch.sort(rank, dim=1, stable=True).indices
    top_bottom = features.box_BN4()[:, layout.order_N[last_R]]
    edge = torch.ones_like(top_bottom[..., 0])
    box_BR4 = torch.stack([edge, top_bottom[..., 1], edge, top_bottom[..., 3]], dim=-1)
    minus_one = torch.full_like(end_BR, -1)
    tokens = torch.cat([kept.tokens_BTD, kept.tokens_BTD.new_zeros(*rows_BR.shape, kept.tokens_BTD.shape[-1])], dim=1)
    return replace(
        kept,
        tokens_BTD=gather_tokens(tokens, order),
        index_BT=torch.cat([kept.index_BT, minus_one], dim=1).gather(1, order),
        source_BT=torch.cat([kept.source_BT, torch.full_like(end_BR, int(Source.NEWLINE))], dim=1).gather(1, order),
        box_BT4=gather_tokens(torch.cat([kept.box_BT4, box_BR4], dim=1), order),
        mask_BT=mask.gather(1, order),
    )
