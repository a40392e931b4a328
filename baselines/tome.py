"""ToMe: similar tokens are merged, pair by pair (Bolya et al., ICLR 2023, arXiv 2210.09461)."""

import math

import torch
import torch.nn.functional as F

from baselines.base import (
    GroupSelector,
    ListOrder,
    PairList,
    Scope,
    absorb,
    chosen_tokens,
    count_per_round,
    products,
    rounds_of,
    rows,
    share_per_round,
    with_merged,
)
from shirg import Budget, Selection, VisionFeatures
from shirg.scoring import unit
from shirg.validation import one_of


class ToMe(GroupSelector):
    """Bipartite soft matching on attention keys, in rounds, until the budget is met.

    A round splits the list of tokens that are left into even and odd places; the r even tokens with the closest odd
    partner are merged into it. A merged token is the mean of all source tokens in it, which is the mean by area; so is
    its key. The paper merges a little in every layer; here all tokens are merged once, behind the tower,
    with the keys of one layer. A merged token keeps the position of the odd token that the others joined. The last
    token of a view has no partner: where the quota is 0 it is dropped, with all that it holds.

    Args:
        budget: tokens per picture.
        scope: each view by itself, as in the paper, or the whole picture.
        rho: share of its positions that a view loses in a round: r is the nearest count, at least 1 and at most every
            second; the paper's r is 4 to 8 % of a picture. A large share merges even tokens whether or not anything
            resembles them.
        order: of the list after a round. "official": the even tokens that stay, by falling cosine, and then the odd
            ones. "reading": by position, which is ours.
        layer: whose keys: an index into the tower's layers (from the end if negative), or a share of its depth.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        rho: float = 0.0625,
        order: ListOrder = "official",
        layer: int | float = -1,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        one_of("order", order, ListOrder)
        self.rho, self.order, self.layer = share_per_round(rho), order, layer
        self.tap = f"keys@{layer}"
        self.needs = frozenset({self.tap})

    def select(self, features: VisionFeatures) -> Selection:
        with torch.no_grad():
            groups, k = self.groups(features)
            sum_BGSD = groups(features.taps[self.tap].float().mean(-2))
            sum_BGSD = self.finite(sum_BGSD, groups)
            s = sum_BGSD.shape[2]
            r = count_per_round(self.rho, s)
            rank_R = torch.arange(r, device=sum_BGSD.device)
            own_BGS = torch.arange(s, device=sum_BGSD.device).expand(groups.valid_BGS.shape)
            owner_BGS, position_S1 = own_BGS, own_BGS[0, 0, :, None]
            pairs = PairList.of(groups.valid_BGS)
            least = min(s, max(groups.most, r, 2))
            for _ in range(rounds_of(math.ceil(s * (1 - groups.share)), r) if s > 1 else 0):
                even, odd = pairs.even(), pairs.odd()
                # The direction of a sum is the direction of its mean: sizes need not be known.
                near_BGEO = products(
                    unit(rows(sum_BGSD, even)), unit(rows(sum_BGSD, odd)), pairs.odd_used(), otherwise=-2.0
                )
                drop_BG = torch.minimum(pairs.n_BG - groups.quota_BG, pairs.odd_used().sum(-1)).clamp_max(r)
                ranked_BGE = pairs.ranked(near_BGEO.amax(-1))
                # At most r tokens are merged away, so r rows decide which token joins which.
                goer_BGR = ranked_BGE[..., :r]
                goes_BGR = rank_R[: goer_BGR.shape[-1]] < drop_BG[..., None]
                from_BGR = even.gather(-1, goer_BGR)
                into_BGR = odd.gather(-1, rows(near_BGEO, goer_BGR).argmax(-1))
                joins_BGSR = (into_BGR[..., None, :] == position_S1) & goes_BGR[..., None, :]
                sum_BGSD = sum_BGSD + joins_BGSR.float() @ rows(sum_BGSD, from_BGR)
                # Those that stay write behind the end: a slot without a token may hold the position of one that goes.
                joined_BGS = F.pad(own_BGS, (0, 1)).scatter(-1, from_BGR.where(goes_BGR, s), into_BGR)
                owner_BGS = joined_BGS.gather(-1, owner_BGS)
                pairs = pairs.without(ranked_BGE, drop_BG, max(pairs.position_BGM.shape[-1] - r, least), self.order)
            # As many as are left, but for the last token of a view with the quota 0.
            stays_BGS = PairList(pairs.position_BGM, groups.quota_BG).mask(s)
        chosen = chosen_tokens(features, groups, stays_BGS, None, k)
        sums_BTD, number_BT = absorb(features, groups, chosen, stays_BGS, owner_BGS, groups.valid_BGS)
        mean_BTD = (sums_BTD / number_BT.clamp_min(1)[..., None]).to(chosen.tokens_BTD.dtype)
        return with_merged(chosen, mean_BTD, number_BT > 1)
