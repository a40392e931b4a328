"""Row ends, where the base model's learned newline vector goes (docs/lavida.md, "Newlines")."""

from dataclasses import replace

import torch
from torch import Tensor

from shirg.features import TokenLayout, VisionFeatures
from shirg.selection import Selection, Source, gather_tokens
from shirg.tables import layout_tables


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
    # Twice the reading place, so that a row end fits between the last token of its row and the first of the next.
    place_BT = 2 * layout.rank_N[kept.index_BT.clamp_min(0)]
    end_BR = (2 * last_R + 1).expand_as(rows_BR)
    mask = torch.cat([kept.mask_BT, rows_BR], dim=1)
    place = torch.cat([place_BT, end_BR], dim=1).masked_fill(~mask, 2 * n)
    order = torch.sort(place, dim=1, stable=True).indices
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
