"""SAINT: tokens that resemble many others are dropped (Jeddi et al., 2025, arXiv 2503.11549).

The published code holds two algorithms. `Saint` is the one with a fixed budget, `SaintVote` the one that votes. Both
prune inside the vision transformer; here all views go through the whole tower and its keys decide what is kept
(docs/method.md, "saint" and "saint_vote").
"""

import math
from typing import Literal

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, PairList, Scope, product_strips, rows, share_per_round, take
from shirg import Budget, Share, UserError, VisionFeatures
from shirg.validation import one_of

Schedule = Literal["alternating", "constant"]


class Saint(GroupSelector):
    """Drops, round by round, the tokens of the highest degree in the graph of similarities.

    degree_i = sum of cos(k_i, k_j) over the tokens j that are left; k are attention keys averaged over heads. Of equal
    degrees the later token goes first. The last round drops only as many as are too many.

    Args:
        budget: tokens per picture.
        scope: one graph per view, or one for the whole picture.
        schedule: "alternating", as in the published code: the first round drops floor(rho n) of n tokens, each later
            one floor(n / what the round before dropped), and each at least one; few and many tokens take turns.
            "constant", ours: each round drops ceil(rho n).
        rho: share of the tokens that the first round drops, or each.
        layer: whose keys: an index into the tower's layers (from the end if negative), or a share of its depth.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        schedule: Schedule = "alternating",
        rho: float = 0.0625,
        layer: int | float = 0.83,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        one_of("schedule", schedule, Schedule)
        self.schedule: Schedule = schedule
        self.rho, self.layer = share_per_round(rho), layer
        self.dropped = Share.of(rho)
        self.tap = f"keys@{layer}"
        self.needs = frozenset({self.tap})

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        k_BGSD = self.unit_keys(features, groups, self.tap)
        left_BGS, n_BG = groups.valid_BGS, groups.valid_BGS.sum(-1)
        scores_BGS = -degree(k_BGSD, left_BGS)
        drop_BG = torch.zeros_like(n_BG)
        for step in range(self.rounds(k_BGSD.shape[2], groups.share)):
            if self.schedule == "constant":
                drop_BG = self.dropped.up(n_BG)
            else:
                drop_BG = (n_BG // drop_BG if step else self.dropped.down(n_BG)).clamp_min(1)
            n_BG = torch.maximum(n_BG - drop_BG, groups.quota_BG)
            left_BGS = take((-degree(k_BGSD, left_BGS)).masked_fill(~left_BGS, float("-inf")), n_BG)
        return left_BGS, scores_BGS

    def rounds(self, most: int, share: float) -> int:
        """Rounds that bring any group of at most `most` tokens to `share` of them, rounded down; an upper bound."""
        if self.schedule == "constant":
            return 1 + int(math.log(1 / share) / -math.log(1 - self.rho))
        # Two rounds drop d and floor((n - d) / d) tokens, at least 2 sqrt(n) - 2 together; one pair more for rounding.
        pairs, n = 1, float(most)
        while n > share * most:
            pairs, n = pairs + 1, n - max(1.0, 2 * math.sqrt(n) - 2)
        return 2 * pairs


def degree(k_BGSD: Tensor, left_BGS: Tensor) -> Tensor:
    """Sum of the cosines of each token with all that are left: one product with their sum, never the whole graph."""
    total_BG1D = left_BGS[..., None, :].float() @ k_BGSD
    return (k_BGSD @ total_BG1D.transpose(-1, -2)).squeeze(-1)


class SaintVote(GroupSelector):
    """Drops even tokens that many odd tokens resemble, in passes with a falling threshold.

    In each pass an even token a has the votes c_a of the odd tokens with cos(k_a, k_b) >= tau. As many are dropped as
    have at least `votes`, the highest c_a exp(gamma (mean similarity of the voters - tau)) first. The first pass is the
    published one, without its batch mean. Then even and odd positions are assigned again and tau is lowered, until the
    budget is met; in the paper the count depends on the picture instead.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the whole picture.
        tau: threshold of the first pass.
        tau_step: by how much each pass lowers it.
        votes: how many voters make a token redundant.
        gamma: how much the voters' similarity counts.
        layer: as for `Saint`.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        tau: float = 0.75,
        tau_step: float = 0.05,
        votes: int = 5,
        gamma: float = 10.0,
        layer: int | float = 0.83,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        if not -1 <= tau <= 1 or not 0 < tau_step <= 2:
            raise UserError(f"tau={tau}, tau_step={tau_step}: give a cosine, and a positive step of at most 2")
        if votes < 1:
            raise UserError(f"votes={votes}: give at least 1")
        self.tau, self.tau_step, self.votes, self.gamma, self.layer = tau, tau_step, votes, gamma, layer
        self.tap = f"keys@{layer}"
        self.needs = frozenset({self.tap})

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        k_BGSD = self.unit_keys(features, groups, self.tap)
        s = k_BGSD.shape[2]
        pairs = PairList.of(groups.valid_BGS)
        falling = 1 + math.ceil((self.tau + 1) / self.tau_step)
        # Below -1 every odd token votes for every even one, and each pass can halve the list.
        for step in range(falling + 1 + int(math.log2(1 / groups.share))):
            tau = self.tau - step * self.tau_step if step < falling else -2.0
            odds_BG1 = pairs.odd_used().sum(-1, keepdim=True)
            even_BGED, odd_BGOD, used_BGO = rows(k_BGSD, pairs.even()), rows(k_BGSD, pairs.odd()), pairs.odd_used()
            total_BGD1 = (odd_BGOD * used_BGO[..., None]).sum(-2)[..., None]
            mean_BGE = (even_BGED @ total_BGD1).squeeze(-1) / odds_BG1.clamp_min(1)
            # One picture at a time: the intermediate tensors are as large as the graph.
            of_each = [votes(*of_one, tau) for of_one in zip(even_BGED, odd_BGOD, used_BGO, strict=True)]
            count_BGE, above_BGE = (torch.stack(values) for values in zip(*of_each, strict=True))
            redundant = (count_BGE >= odds_BG1.clamp_max(self.votes)) & pairs.even_used()
            drop_BG = torch.minimum(redundant.sum(-1), pairs.n_BG - groups.quota_BG)
            voted_BGE = count_BGE * (self.gamma * above_BGE / count_BGE.clamp_min(1)).exp()
            pairs = pairs.without(pairs.ranked(torch.where(count_BGE > 0, voted_BGE, mean_BGE)), drop_BG, s)
        return pairs.mask(s), None


def votes(even_GED: Tensor, odd_GOD: Tensor, used_GO: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """How many odd tokens have a cosine of at least tau to each even token [G, E], and the sum of cosine - tau."""
    counts, above = [], []
    for over_GRO in product_strips(even_GED, odd_GOD, used_GO, otherwise=tau - 1):
        above.append(over_GRO.sub_(tau).relu().sum(-1))
        counts.append(over_GRO.ge_(0).sum(-1))
    return torch.cat(counts, dim=-1), torch.cat(above, dim=-1)
