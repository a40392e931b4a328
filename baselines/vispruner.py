"""VisPruner: important tokens, and then different ones (Zhang et al., ICCV 2025, arXiv 2412.01818)."""

import math

import torch
from torch import Tensor

from baselines.groups import Groups, GroupSelector, Scope, rounds_of, take
from baselines.pairs import Line
from shirg import Budget, VisionFeatures


class VisPruner(GroupSelector):
    """A share of the budget to the most attended tokens, the rest to what remains when duplicates are taken out.

    Attention is what a token receives in one layer, averaged over heads and queries: SigLIP has no [CLS] token, and the
    authors name this mean as its substitute. Duplicates go in rounds: what is left is dealt into even and odd places,
    and the even tokens with the highest cosine to any odd token are dropped, later ones first among equals.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the whole picture, as in the paper, which has one view.
        important: share of the budget that goes to attention.
        drop: tokens that a round drops from each view.
        layer: whose attention: an index into the tower's layers (from the end if negative), or a share of its depth.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        important: float = 0.5,
        drop: int = 8,
        layer: int | float = -1,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        if not 0 <= important <= 1:
            raise ValueError(f"important={important}: give the share of the budget for attention, 0 to 1")
        if drop < 1:
            raise ValueError(f"drop={drop}: give at least 1 token per round")
        self.important, self.drop, self.layer = important, drop, layer
        self.tap = f"attention@{layer}"
        self.needs = frozenset({self.tap})

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        attention_BGS = self.finite(groups(features.taps[self.tap].float())[..., None], groups).squeeze(-1)
        seen_BG = (self.important * groups.quota_BG).floor().long()
        important_BGS = take(attention_BGS.masked_fill(~groups.valid_BGS, -torch.inf), seen_BG)
        return important_BGS | self.different(features, groups, important_BGS), attention_BGS

    def different(self, features: VisionFeatures, groups: Groups, important_BGS: Tensor) -> Tensor:
        """Which of the others are left when as many as the quota asks for have no close relative."""
        x_BGSD = self.unit_tokens(features, groups)
        cosine_BGC = (x_BGSD @ x_BGSD.transpose(-1, -2)).flatten(-2)
        s = x_BGSD.shape[2]
        target_BG = groups.quota_BG - important_BGS.sum(-1)
        line = Line.of(groups.valid_BGS & ~important_BGS)
        # No more than this is in use at the beginning, and at the end.
        most = min(s, math.ceil(s * (1 - self.important * groups.share)) + 2)
        least = min(most, max(math.ceil(groups.most * (1 - self.important)) + 1, self.drop, 2))
        line = Line(line.place_BGM[..., :most], line.n_BG)
        for _ in range(rounds_of(math.ceil(s * (1 - groups.share)), self.drop)):
            # A slot that is not in use repeats the first one, which changes no maximum.
            even, odd = line.even(), torch.where(line.odd_used(), line.odd(), line.odd()[..., :1])
            pair_BGEO = cosine_BGC.gather(-1, (even[..., :, None] * s + odd[..., None, :]).flatten(-2))
            closest_BGE = pair_BGEO.unflatten(-1, (even.shape[-1], odd.shape[-1])).amax(-1)
            drop_BG = torch.minimum(line.n_BG - target_BG, line.even_used().sum(-1)).clamp_max(self.drop)
            line = line.without(line.worst(closest_BGE, drop_BG), max(line.place_BGM.shape[-1] - self.drop, least))
        return line.mask(s)
