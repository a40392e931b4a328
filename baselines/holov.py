"""HoloV: a budget for each crop of the picture (Zou et al., NeurIPS 2025, arXiv 2510.02912).

Shape letters beside those of baselines/base.py: C crops of a group, L slots of a crop.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, Space, chosen_tokens, stage_of, take
from shirg import Budget, Selection, UserError, VisionFeatures, assert_finite, gather_tokens
from shirg.validation import one_of

RankBy = Literal["attention", "score"]
SCALE = 1000.0
"""Attention is multiplied by this before it is added to variances."""
SHARE = 0.09
"""Weight of the variance, once its mean in a crop equals that of the attention."""
EPS = 1e-6


class HoloV(GroupSelector):
    """Splits the tokens into crops, gives each crop a quota by its mean score, and keeps its most attended tokens.

    A crop is a run of consecutive valid tokens in reading order; of n tokens and C crops the first n mod C have one
    more. With S the cosines of a crop's n_c tokens, its diagonal set to 0:

        m_i = sum_j S_ij / (n_c - 1),  var_i = sum_j (S_ij - m_i)^2 / (n_c - 1)
        score_i = 1000 a_i + .09 var_i mean(1000 a) / (mean(var) + 1e-6)

    a is the attention that a token receives, averaged over heads and queries. A crop of one token has the score a, not
    scaled. The weight of a crop is its mean score by the sum of all, its quota floor(T weight); the tokens that are
    missing go one each to the crops of the largest weights. What a crop cannot take because it is full is not given to
    others: these slots stay unused.

    Args:
        budget: tokens per picture, at most.
        scope: the whole picture, global view first and then the canvas without padding, as in the authors' code; or
            each view by itself.
        crops: per picture, or per view with `scope=per_view`.
        layer: whose attention: an index into the tower's layers (from the end if negative), or a share of its depth.
        rank_by: what chooses the tokens of a crop: "attention", as in the authors' code, or "score", score_i, which is
            ours. With "attention" the cosines hardly matter: in the mean score mean(var) cancels, but for the 1e-6.
        space: whether the cosines are of projected tokens, as in the authors' code, or of encoder states; then only
            selected tokens are projected.
    """

    may_use_less = True

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "global",
        crops: int = 16,
        layer: int | float = -1,
        rank_by: RankBy = "attention",
        space: Space = "projected",
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        if crops < 1:
            raise UserError(f"crops={crops}: give at least 1")
        one_of("rank_by", rank_by, RankBy)
        self.crops, self.layer = crops, layer
        self.rank_by: RankBy = rank_by
        self.space: Space = space
        self.stage = stage_of(space)
        self.tap = f"attention@{layer}"
        self.needs = frozenset({self.tap})

    def select(self, features: VisionFeatures) -> Selection:
        with torch.no_grad():
            groups, k = self.groups(features)
            chosen_BGS, ranked_BGS = self.choose(features, groups)
        # A group keeps fewer than its quota where a crop is full.
        kept = replace(groups, quota_BG=chosen_BGS.sum(-1))
        return chosen_tokens(features, kept, chosen_BGS, ranked_BGS, k)

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor]:
        attention_BGS = self.finite(groups(features.taps[self.tap].float())[..., None], groups).squeeze(-1)
        crops = Crops.of(groups.valid_BGS, self.crops)
        attention_BGCL = crops(attention_BGS) * crops.used_BGCL
        score_BGCL, mean_BGC = scores(attention_BGCL, self.variance(features, groups, crops), crops)
        quota_BGC = torch.minimum(quotas(mean_BGC, crops.size_BGC, groups.quota_BG), crops.size_BGC)
        ranked_BGCL = attention_BGCL if self.rank_by == "attention" else score_BGCL
        chosen_BGCL = take(ranked_BGCL.masked_fill(~crops.used_BGCL, -torch.inf), quota_BGC)
        return crops.back(chosen_BGCL.long()) > 0, crops.back(ranked_BGCL)

    def variance(self, features: VisionFeatures, groups: Groups, crops: "Crops") -> Tensor:
        """var_i [B, G, C, L]; 0 where no token is, and in crops of one token."""
        used_BGCL = crops.used_BGCL
        token_BM = crops(groups.index_GS.expand_as(groups.valid_BGS)).flatten(1)
        x_BMD = gather_tokens(features.tokens_BND, token_BM).float()
        length_BM1 = torch.linalg.vector_norm(x_BMD, dim=-1, keepdim=True)
        assert_finite(length_BM1.squeeze(-1), used_BGCL.flatten(1), type(self).__name__)
        x_BGCLD = torch.unflatten(x_BMD.div_(length_BM1 + EPS), 1, used_BGCL.shape[1:])
        column_BGC1L = used_BGCL[..., None, :]
        cosine_BGCLL = (x_BGCLD @ x_BGCLD.transpose(-1, -2)).mul_(column_BGC1L)
        cosine_BGCLL.diagonal(dim1=-2, dim2=-1).zero_()
        others_BGC1 = (crops.size_BGC - 1).clamp_min(1)[..., None]
        mean_BGCL = cosine_BGCLL.sum(-1) / others_BGC1
        off_BGCLL = cosine_BGCLL.sub_(mean_BGCL[..., None]).mul_(column_BGC1L)
        return off_BGCLL.square_().sum(-1) / others_BGC1 * used_BGCL


@dataclass(frozen=True, eq=False)
class Crops:
    """Where the crops of each group are. Every crop has L slots, as many as the longest can have."""

    by_rank_BGS: Tensor
    """int64: the positions of a group, valid ones first."""
    position_BGCL: Tensor
    """int64: the position in the group; of a slot that is not used, any."""
    used_BGCL: Tensor
    """bool: which slots hold a token."""
    size_BGC: Tensor
    """int64: tokens per crop."""

    @classmethod
    def of(cls, valid_BGS: Tensor, crops: int) -> Self:
        s = valid_BGS.shape[-1]
        by_rank_BGS = torch.sort(valid_BGS.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        n_BG1 = valid_BGS.sum(-1, keepdim=True)
        number_C = torch.arange(crops, device=valid_BGS.device)
        size_BGC = n_BG1 // crops + (number_C < n_BG1 % crops)
        start_BGC = size_BGC.cumsum(-1) - size_BGC
        slot_L = torch.arange(-(-s // crops), device=valid_BGS.device)
        rank_BGCL = (start_BGC[..., None] + slot_L).clamp_max(s - 1)
        position_BGCL = by_rank_BGS.gather(-1, rank_BGCL.flatten(2)).view_as(rank_BGCL)
        return cls(by_rank_BGS, position_BGCL, slot_L < size_BGC[..., None], size_BGC)

    def __call__(self, per_position_BGS: Tensor) -> Tensor:
        """[B, G, S] -> [B, G, C, L]."""
        return per_position_BGS.gather(-1, self.position_BGCL.flatten(2)).view_as(self.position_BGCL)

    def back(self, values_BGCL: Tensor) -> Tensor:
        """[B, G, C, L], 0 in slots that are not used, -> [B, G, S]; 0 in padding."""
        zeros_BGS = torch.zeros_like(self.by_rank_BGS, dtype=values_BGCL.dtype)
        # Added up, because a slot that is not used points at the position of another slot.
        return zeros_BGS.scatter_add(-1, self.position_BGCL.flatten(2), values_BGCL.flatten(2))


def scores(attention_BGCL: Tensor, variance_BGCL: Tensor, crops: Crops) -> tuple[Tensor, Tensor]:
    """The score of each token [B, G, C, L], and the mean of each crop [B, G, C]; 0 where a crop is empty."""
    n_BGC1 = crops.size_BGC.clamp_min(1)[..., None]
    scaled_BGCL = SCALE * attention_BGCL
    level_BGC1 = scaled_BGCL.sum(-1, keepdim=True) / n_BGC1
    variation_BGC1 = variance_BGCL.sum(-1, keepdim=True) / n_BGC1
    score_BGCL = scaled_BGCL + SHARE * variance_BGCL * (level_BGC1 / (variation_BGC1 + EPS))
    score_BGCL = torch.where(crops.size_BGC[..., None] == 1, attention_BGCL, score_BGCL)
    return score_BGCL, score_BGCL.sum(-1) / n_BGC1.squeeze(-1)


def quotas(mean_BGC: Tensor, size_BGC: Tensor, total_BG: Tensor) -> Tensor:
    """int64 [B, G, C]: the total split by weight, rounded down; what is missing goes to the largest weights."""
    weight_BGC = mean_BGC / (mean_BGC.sum(-1, keepdim=True) + EPS)
    given_BGC = (weight_BGC * total_BG[..., None]).floor().long()
    missing_BG = total_BG - given_BGC.sum(-1)
    return given_BGC + take(weight_BGC.masked_fill(size_BGC == 0, -torch.inf), missing_BG)
