"""ToMe: similar tokens are merged, pair by pair (Bolya et al., ICLR 2023, arXiv 2210.09461)."""

import math

import torch

from baselines.groups import GroupSelector, Scope, absorb, chosen_tokens, rounds_of
from baselines.pairs import Line
from baselines.saint import rows
from baselines.visionzip import merged
from shirg import Budget, Selection, VisionFeatures
from shirg.scoring import unit


class ToMe(GroupSelector):
    """Bipartite soft matching on attention keys, in rounds, until the budget is met.

    A round deals what is left into even and odd places; the r even tokens with the closest odd partner are merged into
    it. A merged token is the mean of all source tokens in it, which is the mean by area; so is its key. The paper
    merges a little in every layer; here everything happens once, behind the tower, with the keys of one layer. A merged
    token is read at the place of the odd token that it grew from.

    Args:
        budget: tokens per picture.
        scope: each view by itself, as in the paper, or the whole picture.
        r: tokens that a round merges away from each view; at most every second.
        layer: whose keys: an index into the tower's layers (from the end if negative), or a share of its depth.
    """

    def __init__(self, *, budget: Budget, scope: Scope = "per_view", r: int = 32, layer: int | float = -1) -> None:
        super().__init__(budget=budget, scope=scope)
        if r < 1:
            raise ValueError(f"r={r}: give at least 1 token per round")
        self.r, self.layer = r, layer
        self.tap = f"keys@{layer}"
        self.needs = frozenset({self.tap})

    def select(self, features: VisionFeatures) -> Selection:
        with torch.no_grad():
            groups, k = self.groups(features)
            sum_BGSD = groups(features.taps[self.tap].float().mean(-2))
            sum_BGSD = self.finite(sum_BGSD, groups)
            s = sum_BGSD.shape[2]
            owner_BGS = torch.arange(s, device=sum_BGSD.device).expand(groups.valid_BGS.shape)
            line = Line.of(groups.valid_BGS)
            least = min(s, max(groups.most, self.r, 2))
            for _ in range(rounds_of(math.ceil(s * (1 - groups.share)), self.r)):
                even, odd = line.even(), line.odd()
                sum_BGED = rows(sum_BGSD, even)
                # The direction of a sum is the direction of its mean: sizes need not be known.
                near_BGEO = unit(sum_BGED) @ unit(rows(sum_BGSD, odd)).transpose(-1, -2)
                closest = near_BGEO.masked_fill(~line.odd_used()[..., None, :], -2.0).max(-1)
                drop_BG = torch.minimum(line.n_BG - groups.quota_BG, line.odd_used().sum(-1)).clamp_max(self.r)
                gone_BGE = line.worst(closest.values, drop_BG)
                into_BGE = odd.gather(-1, closest.indices)
                slots = torch.arange(odd.shape[-1], device=odd.device)
                joins_BGEO = gone_BGE[..., None] & (closest.indices[..., None] == slots)
                added_BGOD = joins_BGEO.float().transpose(-1, -2) @ sum_BGED
                place_BGOD = odd[..., None].expand_as(added_BGOD)
                sum_BGSD = sum_BGSD.scatter(2, place_BGOD, sum_BGSD.gather(2, place_BGOD) + added_BGOD)
                moved_BGS = torch.arange(s, device=odd.device).expand_as(owner_BGS)
                moved_BGS = moved_BGS.scatter(-1, even, torch.where(gone_BGE, into_BGE, even))
                owner_BGS = moved_BGS.gather(-1, owner_BGS)
                line = line.without(gone_BGE, max(line.place_BGM.shape[-1] - self.r, least))
            stays_BGS = line.mask(s)
        chosen = chosen_tokens(features, groups, stays_BGS, None, k)
        sums_BTD, number_BT = absorb(features, groups, chosen, stays_BGS, owner_BGS, groups.valid_BGS)
        mean_BTD = (sums_BTD / number_BT.clamp_min(1)[..., None]).to(chosen.tokens_BTD.dtype)
        return merged(chosen, mean_BTD, number_BT > 1)
