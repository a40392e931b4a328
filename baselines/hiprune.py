"""HiPrune: what a middle layer attends to, its surroundings, and what the last layer attends to (arXiv 2508.00553)."""

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, take
from shirg import Budget, UserError, VisionFeatures

PER_ANCHOR = 5
"""Tokens that an anchor is counted as: itself and its four neighbours."""


class HiPrune(GroupSelector):
    """Anchors, their neighbours (buffers), and the most attended of the rest (registers), in each view by itself.

    Of a quota of T tokens, the round(alpha T / 5) most attended tokens of a middle layer are anchors; halves are
    rounded to even. Buffers are the tokens at the positions i - 1, i + 1, i - side and i + side of each anchor i in
    the view's raster. Positions outside the view are moved to its first or last token, and a neighbour in the raster
    may lie in another row, as in the authors' code. Padding is never kept. The rest of the quota goes to the tokens
    that the deep layer attends to most. Attention is what a token receives, averaged over heads and queries.

    With alpha above .5, anchors and buffers can exceed a small quota. Then the anchors stay, and the buffers with the
    most attention in the deep layer.

    There is no scope: neighbours are those of a view's raster.

    Args:
        budget: tokens per picture.
        alpha: share of the quota that anchors and buffers get, were no buffer counted twice.
        object_layer: whose attention chooses anchors: an index into the tower's layers (from the end if negative), or a
            share of its depth. The paper's layer 9 of 24, counted from 1, is 0.35.
        layer: whose attention chooses registers.
    """

    def __init__(
        self, *, budget: Budget, alpha: float = 0.1, object_layer: int | float = 0.35, layer: int | float = -1
    ) -> None:
        super().__init__(budget=budget)
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha={alpha}: give the share of the budget for anchors and their neighbours, 0 to 1")
        if alpha == 0 and object_layer != 0.35:
            raise UserError("object_layer has no effect with alpha=0, which has no anchors; leave it at its default")
        self.alpha, self.object_layer, self.layer = alpha, object_layer, layer
        self.middle, self.deep = f"attention@{object_layer}", f"attention@{layer}"
        self.needs = frozenset({self.middle, self.deep})

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        middle_BGS, deep_BGS = (
            self.finite(groups(features.taps[tap].float())[..., None], groups).squeeze(-1)
            for tap in (self.middle, self.deep)
        )
        # In float64, because the authors' Python computes in it, and a product near a half must round as theirs does.
        anchors_BG = (groups.quota_BG.double() * self.alpha / PER_ANCHOR).round().long()
        anchor_BGS = take(middle_BGS.masked_fill(~groups.valid_BGS, -torch.inf), anchors_BG)
        first_BGS = anchor_BGS | (around(anchor_BGS, features.layout.view_shape[1]) & groups.valid_BGS)
        ranked_BGS = deep_BGS.masked_fill(~first_BGS, -torch.inf).masked_fill(anchor_BGS, torch.inf)
        first_BGS = take(ranked_BGS, torch.minimum(first_BGS.sum(-1), groups.quota_BG))
        others_BGS = deep_BGS.masked_fill(first_BGS | ~groups.valid_BGS, -torch.inf)
        return first_BGS | take(others_BGS, groups.quota_BG - first_BGS.sum(-1)), deep_BGS


def around(marked_BGS: Tensor, columns: int) -> Tensor:
    """bool [B, G, S]: the positions i - 1, i + 1, i - columns, i + columns of the marked i, held to 0..S - 1."""
    near_BGS = torch.zeros_like(marked_BGS)
    for step in (1, columns):
        near_BGS[..., :-step] |= marked_BGS[..., step:]
        near_BGS[..., step:] |= marked_BGS[..., :-step]
        near_BGS[..., 0] |= marked_BGS[..., :step].any(-1)
        near_BGS[..., -1] |= marked_BGS[..., -step:].any(-1)
    return near_BGS
