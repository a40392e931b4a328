"""VisionZip: dominant tokens, and means of the rest (Yang et al., CVPR 2025, arXiv 2412.04467)."""

from typing import Literal

import torch

from baselines.base import GroupSelector, Scope, absorb, chosen_tokens, every, products, spread, take, with_merged
from shirg import Budget, Selection, Share, UserError, VisionFeatures
from shirg.validation import one_of

Targets = Literal["official", "centres"]


class VisionZip(GroupSelector):
    """The most attended tokens, unchanged, and contextual tokens that the others are merged into.

    Attention is what a token receives in one layer, averaged over heads and queries, as SigLIP has no [CLS] token.
    Contextual targets are spaced evenly among the rest; each other token joins the target whose key it resembles most,
    and a target becomes itself plus the mean of its members. A merged token keeps the position of its target in reading
    order, it does not follow the dominant tokens; a target without members is unchanged.

    Args:
        budget: tokens per picture, dominant and contextual.
        scope: each view by itself, as in the paper, or the whole picture.
        contextual: share of the budget for contextual tokens, rounded up; the paper has 10 of 64.
        targets: "official" takes every floor(n / c)-th of the n others for c targets, beginning with the first, and
            leaves a remainder at the end without one. "centres" takes the middle of c equal parts, which is ours.
        layer: whose attention and keys: an index into the tower's layers (from the end if negative), or a share of its
            depth.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        contextual: float = 0.15625,
        targets: Targets = "official",
        layer: int | float = -1,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        if not 0 <= contextual <= 1:
            raise UserError(f"contextual={contextual}: give the share of the budget for merged tokens, 0 to 1")
        one_of("targets", targets, Targets)
        if contextual == 0 and targets != "official":
            raise UserError("targets has no effect with contextual=0, which merges nothing; leave it at its default")
        self.contextual, self.targets, self.layer = contextual, targets, layer
        self.merged = Share.of(contextual)
        self.attention, self.keys = f"attention@{layer}", f"keys@{layer}"
        self.needs = frozenset({self.attention, self.keys})

    def select(self, features: VisionFeatures) -> Selection:
        with torch.no_grad():
            groups, k = self.groups(features)
            attention_BGS = self.finite(groups(features.taps[self.attention].float())[..., None], groups).squeeze(-1)
            merged_BG = self.merged.up(groups.quota_BG)
            ranked_BGS = attention_BGS.masked_fill(~groups.valid_BGS, -torch.inf)
            dominant_BGS = take(ranked_BGS, groups.quota_BG - merged_BG)
            rest_BGS = groups.valid_BGS & ~dominant_BGS
            target_BGS = (every if self.targets == "official" else spread)(rest_BGS, merged_BG)
            k_BGSD = self.unit_keys(features, groups, self.keys)
            near_BGSS = products(k_BGSD, k_BGSD, target_BGS, -2.0)
            owner_BGS = near_BGSS.argmax(-1)
            member_BGS = rest_BGS & ~target_BGS & target_BGS.any(-1, keepdim=True)
            stays_BGS = dominant_BGS | target_BGS
        chosen = chosen_tokens(features, groups, stays_BGS, attention_BGS, k)
        sums_BTD, number_BT = absorb(features, groups, chosen, stays_BGS, owner_BGS, member_BGS)
        mean_BTD = (sums_BTD / number_BT.clamp_min(1)[..., None]).to(chosen.tokens_BTD.dtype)
        return with_merged(chosen, chosen.tokens_BTD + mean_BTD, number_BT > 0)
