"""Entity-token recall: the share of the tokens showing the evidence that the selector kept. No language model needed.

Shape letters: N source tokens, T selected tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.metrics.answer_metric import EvalMetric
from shirg import UserError


def target_tokens(boxes: Sequence[Sequence[float]], token_box_N4: Tensor, eligible_N: Tensor) -> Tensor:
    """Which of the N tokens [bool] show one of the boxes.

    A token shows a box when the token's centre lies in it (left and top edge included, right and bottom not). A box so
    small that it holds no centre is shown by the one token whose centre is nearest to its own, the first of equals.

    Args:
        boxes: (x0, y0, x1, y1) as fractions of the picture.
        token_box_N4: the tokens' boxes in the same frame, as `shirg.VisionFeatures.box_BN4` gives them for a picture.
        eligible_N: bool; the tokens that count: those of tiles and crops, without padding. The global view shows
            everything a second time, too small to read. A picture without tiles has its global tokens count.
    """
    if not bool(eligible_N.any()):
        raise UserError("no token is eligible for entity recall; count the global view where there are no tiles")
    centre_N2 = (token_box_N4[:, :2] + token_box_N4[:, 2:]).double() / 2
    shown_N = torch.zeros_like(eligible_N)
    for box in boxes:
        low, high = torch.tensor(box, dtype=torch.float64, device=centre_N2.device).view(2, 2)
        inside_N = ((centre_N2 >= low) & (centre_N2 < high)).all(dim=-1) & eligible_N
        if not bool(inside_N.any()):
            away_N = (centre_N2 - (low + high) / 2).square().sum(dim=-1)
            inside_N[away_N.masked_fill(~eligible_N, torch.inf).argmin()] = True
        shown_N |= inside_N
    return shown_N


def entity_recall(
    *, boxes: Sequence[Sequence[float]], token_box_N4: Tensor, eligible_N: Tensor, kept_T: Tensor
) -> float | None:
    """Share of the target tokens that were kept; None for a sample without boxes.

    `kept_T` holds source token indices as `shirg.Selection.index_BT` does; synthesised tokens (-1) keep nothing.
    """
    if not boxes:
        return None
    target_N = target_tokens(boxes, token_box_N4, eligible_N)
    kept_N = torch.zeros_like(target_N)
    kept_N[kept_T[kept_T >= 0]] = True
    return float((target_N & kept_N).sum() / target_N.sum())


class EntityRecall(EvalMetric):
    """`entity_recall` by its name in `data.metrics`; experiments.token_stats computes it from the selections."""
