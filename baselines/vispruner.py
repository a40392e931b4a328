"""VisPruner: important tokens, and then different ones (Zhang et al., ICCV 2025, arXiv 2412.01818)."""

import math

import torch
from torch import Tensor

from baselines.base import (
    Groups,
    GroupSelector,
    ListOrder,
    PairList,
    Scope,
    count_per_round,
    gram,
    rounds_of,
    rows,
    share_per_round,
    take,
)
from shirg import Budget, Share, UserError, VisionFeatures
from shirg.validation import one_of

FAR = -4.0
"""Added to a cosine, it makes it smaller than any other cosine."""


class VisPruner(GroupSelector):
    """A share of the budget for the most attended tokens, the rest for what remains when duplicates are removed.

    Attention is what a token receives in one layer, averaged over heads and queries: SigLIP has no [CLS] token, and the
    authors name this mean as its substitute. Duplicates are removed in rounds: the list of tokens that are left is
    split into even and odd places, and the even tokens with the highest cosine to any odd token are dropped, of equal
    ones the last first.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the whole picture, as in the paper, which has one view.
        important: share of the budget that goes to attention.
        rho: share of its positions that a view loses in a round, rounded, at least one; the authors drop 8 of 576.
        order: of the list. "official": at first by falling attention; after a round the even tokens that stay, by
            falling cosine, and then the odd ones. "reading": always by position, which is ours.
        layer: whose attention: an index into the tower's layers (from the end if negative), or a share of its depth.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        important: float = 0.5,
        rho: float = 0.014,
        order: ListOrder = "official",
        layer: int | float = -1,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        if not 0 <= important <= 1:
            raise UserError(f"important={important}: give the share of the budget for attention, 0 to 1")
        one_of("order", order, ListOrder)
        if important == 1 and (rho, order) != (0.014, "official"):
            raise UserError(
                "rho and order have no effect with important=1, which leaves no token to the search for duplicates; "
                "leave them at their defaults"
            )
        if important == 0 and order == "reading" and layer != -1:
            raise UserError(
                "layer has no effect with important=0 and order=reading, which read no attention; leave it at its "
                "default"
            )
        self.important, self.rho, self.order, self.layer = important, share_per_round(rho), order, layer
        self.seen = Share.of(important)
        self.tap = f"attention@{layer}"
        self.needs = frozenset({self.tap})

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        attention_BGS = self.finite(groups(features.taps[self.tap].float())[..., None], groups).squeeze(-1)
        seen_BG = self.seen.down(groups.quota_BG)
        important_BGS = take(attention_BGS.masked_fill(~groups.valid_BGS, -torch.inf), seen_BG)
        first = PairList.of(groups.valid_BGS & ~important_BGS, attention_BGS if self.order == "official" else None)
        return important_BGS | self.different(features, groups, first, groups.quota_BG - seen_BG), attention_BGS

    def different(self, features: VisionFeatures, groups: Groups, pairs: PairList, target_BG: Tensor) -> Tensor:
        """bool [B, G, S]: the tokens of a list that are left when duplicates are removed until `target` of them are."""
        s = groups.valid_BGS.shape[-1]
        drop = count_per_round(self.rho, s)
        # No more than this is in use at the beginning, and at the end.
        most = min(s, math.ceil(s * (1 - self.important * groups.share)) + 2)
        least = min(most, max(math.ceil(groups.most * (1 - self.important)) + 1, drop, 2))
        position_BGM = pairs.position_BGM[..., :most]
        cosine_BGMM = gram(rows(self.unit_tokens(features, groups), position_BGM))
        pairs = PairList(torch.arange(most, device=position_BGM.device).expand_as(position_BGM), pairs.n_BG)
        for _ in range(rounds_of(math.ceil(s * (1 - groups.share)), drop)):
            # Whole rows, with FAR added to all columns but the odd: much faster than to gather the pairs.
            reach_BGM = torch.full_like(cosine_BGMM[..., 0], FAR)
            reach_BGM = reach_BGM.scatter(-1, pairs.odd(), torch.where(pairs.odd_used(), 0.0, FAR))
            closest_BGE = rows(cosine_BGMM, pairs.even()).add_(reach_BGM[..., None, :]).amax(-1)
            drop_BG = torch.minimum(pairs.n_BG - target_BG, pairs.even_used().sum(-1)).clamp_max(drop)
            slots = max(pairs.position_BGM.shape[-1] - drop, least)
            pairs = pairs.without(pairs.ranked(closest_BGE), drop_BG, slots, self.order)
        return torch.zeros_like(groups.valid_BGS).scatter(-1, position_BGM, pairs.mask(most))
