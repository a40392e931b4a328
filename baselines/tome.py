"""ToMe: similar tokens are merged, pair by pair (Bolya et al., ICLR 2023, arXiv 2210.09461)."""

import math

import torch

from baselines.base import (
    GroupSelector,
    PairList,
    Scope,
    absorb,
    chosen_tokens,
    products,
    rounds_of,
    rows,
    share_per_round,
    with_merged,
)
from shirg import Budget, Selection, VisionFeatures
from shirg.scoring import unit


class ToMe(GroupSelector):
    """Bipartite soft matching on attention keys, in rounds, until the budget is met.

    A round splits the tokens that are left into even and odd positions; the r = ceil(rho S) even tokens of S with the
    closest odd partner are merged into it. A merged token is the mean of all source tokens in it, which is the mean by
    area; so is its key. The paper merges a little in every layer; here all tokens are merged once, behind the tower,
    with the keys of one layer. A merged token keeps the position of the odd token that the others joined.

    Args:
        budget: tokens per picture.
        scope: each view by itself, as in the paper, or the whole picture.
        rho: share of its positions that a view loses in a round, at most every second; the paper's r is 4 to 8 % of a
            picture. A large share merges even tokens whether or not anything resembles them.
        layer: whose keys: an index into the tower's layers (from the end if negative), or a share of its depth.
    """

    def __init__(
        self, *, budget: Budget, scope: Scope = "per_view", rho: float = 0.0625, layer: int | float = -1
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        self.rho, self.layer = share_per_round(rho), layer
        self.tap = f"keys@{layer}"
        self.needs = frozenset({self.tap})

    def select(self, features: VisionFeatures) -> Selection:
        with torch.no_grad():
            groups, k = self.groups(features)
            sum_BGSD = groups(features.taps[self.tap].float().mean(-2))
            sum_BGSD = self.finite(sum_BGSD, groups)
            s = sum_BGSD.shape[2]
            r = math.ceil(self.rho * s)
            own_BGS = torch.arange(s, device=sum_BGSD.device).expand(groups.valid_BGS.shape)
            owner_BGS, position_S1 = own_BGS, own_BGS[0, 0, :, None]
            pairs = PairList.of(groups.valid_BGS)
            least = min(s, max(groups.most, r, 2))
            for _ in range(rounds_of(math.ceil(s * (1 - groups.share)), r)):
                even, odd = pairs.even(), pairs.odd()
                # The direction of a sum is the direction of its mean: sizes need not be known.
                near_BGEO = products(
                    unit(rows(sum_BGSD, even)), unit(rows(sum_BGSD, odd)), pairs.odd_used(), otherwise=-2.0
                )
                drop_BG = torch.minimum(pairs.n_BG - groups.quota_BG, pairs.odd_used().sum(-1)).clamp_max(r)
                gone_BGE = pairs.worst(near_BGEO.amax(-1), drop_BG)
                # At most r tokens are merged away, so r rows decide which token joins which.
                goer_BGR = torch.sort(gone_BGE.to(torch.uint8), dim=-1, descending=True, stable=True).indices
                goer_BGR = goer_BGR[..., :r]
                from_BGR = even.gather(-1, goer_BGR)
                into_BGR = odd.gather(-1, rows(near_BGEO, goer_BGR).argmax(-1))
                into_BGR = torch.where(gone_BGE.gather(-1, goer_BGR), into_BGR, from_BGR)
                joins_BGSR = (into_BGR[..., None, :] == position_S1) & (into_BGR != from_BGR)[..., None, :]
                sum_BGSD = sum_BGSD + joins_BGSR.float() @ rows(sum_BGSD, from_BGR)
                owner_BGS = own_BGS.scatter(-1, from_BGR, into_BGR).gather(-1, owner_BGS)
                pairs = pairs.without(gone_BGE, max(pairs.position_BGM.shape[-1] - r, least))
            stays_BGS = pairs.mask(s)
        chosen = chosen_tokens(features, groups, stays_BGS, None, k)
        sums_BTD, number_BT = absorb(features, groups, chosen, stays_BGS, owner_BGS, groups.valid_BGS)
        mean_BTD = (sums_BTD / number_BT.clamp_min(1)[..., None]).to(chosen.tokens_BTD.dtype)
        return with_merged(chosen, mean_BTD, number_BT > 1)
