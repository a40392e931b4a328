"""TopV: tokens that carry the most of an optimal transport plan stay (Yang et al., CVPR 2025, arXiv 2503.18278).

A reconstruction: the authors' code is not public, and their constants and constraint set are not given where we could
read them (docs/method.md, "topv").
"""

import math
from typing import Literal

import torch
from torch import Tensor

from baselines.groups import Groups, GroupSelector, Scope, spread, take
from shirg import Budget, Role, VisionFeatures, assert_finite, gather_tokens
from shirg.knobs import one_of

Marginals = Literal["semi_relaxed", "balanced_cols_last"]
SINKHORN_STEPS = 3


class TopV(GroupSelector):
    """Keeps the sources of the most transported mass, and a few of the others at even distances.

    Sources s are the states that enter the last layer, targets t the normed states between its attention and its MLP.

        cost_ij = alpha |s_i - t_j|^2 + beta (1 - exp(-distance_ij^2 / 2 sigma^2)) + gamma (distance of i to the centre)

    with each factor brought to 0..1. G = exp(-cost / eps), and the importance of i is the mass that the plan takes from
    it. In a balanced plan that mass is prescribed, so it says nothing about the picture; hence "semi_relaxed", where
    only targets receive a prescribed mass: P_ij = G_ij / sum_i G_ij.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the canvas and the global view, scaled up to it, as one.
        marginals: "balanced_cols_last" is three Sinkhorn steps that end with the columns; its contrast is faint.
        alpha, beta, gamma: weights of features, relative place and distance to the centre.
        sigma: in tokens.
        eps: temperature of the plan.
        recover: share of the budget for tokens that the ranking would prune, taken evenly in reading order.
    """

    needs = frozenset({"input@-1", "post_norm@-1"})

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        marginals: Marginals = "semi_relaxed",
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.01,
        sigma: float = 10.0,
        eps: float = 0.1,
        recover: float = 0.1,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        one_of("marginals", marginals, Marginals)
        if min(alpha, beta, gamma) < 0 or alpha + beta + gamma == 0:
            raise ValueError(f"alpha={alpha}, beta={beta}, gamma={gamma}: give numbers >= 0, one of them larger")
        if min(sigma, eps) <= 0 or not 0 <= recover < 1:
            raise ValueError(f"sigma={sigma}, eps={eps}, recover={recover}: give sigma, eps > 0 and 0 <= recover < 1")
        self.marginals: Marginals = marginals
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.sigma, self.eps, self.recover = sigma, eps, recover

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        importance_BGS = self.importance(features, groups)
        again_BG = (self.recover * groups.quota_BG).ceil().long()
        ranked_BGS = importance_BGS.masked_fill(~groups.valid_BGS, float("-inf"))
        top_BGS = take(ranked_BGS, groups.quota_BG - again_BG)
        return top_BGS | spread(groups.valid_BGS & ~top_BGS, again_BG), importance_BGS

    def importance(self, features: VisionFeatures, groups: Groups) -> Tensor:
        """Mass [B, G, S] that leaves each source, in units of the mean; 0 in padding."""
        valid_BGS = groups.valid_BGS
        # Padding is stood in for by the first valid token of its group, so that it changes no extreme.
        place_BGS = torch.arange(valid_BGS.shape[-1], device=valid_BGS.device).expand_as(valid_BGS)
        place_BGS = torch.where(valid_BGS, place_BGS, valid_BGS.to(torch.uint8).argmax(-1, keepdim=True))
        token_BN = groups.index_GS.expand_as(place_BGS).gather(-1, place_BGS).flatten(1)
        source, target = (
            torch.unflatten(gather_tokens(features.taps[tap], token_BN).float(), 1, valid_BGS.shape[1:])
            for tap in ("input@-1", "post_norm@-1")
        )
        cost = torch.matmul(source.mul(-2), target.transpose(-1, -2))
        cost += source.square().sum(-1)[..., :, None]
        cost += target.square().sum(-1)[..., None, :]
        assert_finite(cost.sum(-1), valid_BGS, type(self).__name__)
        cost = to_unit(cost, (-2, -1)).mul_(self.alpha)
        row_BGS, col_BGS, off_BGS = (x.expand_as(valid_BGS).gather(-1, place_BGS) for x in places(features, groups))
        apart = (row_BGS[..., :, None] - row_BGS[..., None, :]).square_()
        apart += (col_BGS[..., :, None] - col_BGS[..., None, :]).square_()
        cost += to_unit(1 - apart.div_(-2 * self.sigma**2).exp_(), (-2, -1)).mul_(self.beta)
        cost += self.gamma * to_unit(off_BGS, (-1,))[..., None]
        # A column's smallest cost cancels out of the plan; without it exp() could vanish for a whole column.
        cost -= cost.masked_fill(~valid_BGS[..., :, None], math.inf).amin(-2, keepdim=True).nan_to_num(posinf=0.0)
        plan = cost.div_(-self.eps).exp_().mul_(valid_BGS[..., :, None]).mul_(valid_BGS[..., None, :])
        return transported(plan, valid_BGS, self.marginals)


def transported(plan_BGSS: Tensor, valid_BGS: Tensor, marginals: Marginals) -> Tensor:
    """Row sums of the plan that the kernel becomes under the constraints; the mean over valid rows is 1."""
    weight_BGS = valid_BGS.float()

    def share(total_BGS: Tensor) -> Tensor:
        return torch.where(total_BGS > 0, weight_BGS / total_BGS.clamp_min(torch.finfo(torch.float32).tiny), 0.0)

    u_BGS = weight_BGS
    v_BGS = share(torch.einsum("bgij,bgi->bgj", plan_BGSS, u_BGS))
    if marginals == "balanced_cols_last":
        for _ in range(SINKHORN_STEPS - 1):
            u_BGS = share(torch.einsum("bgij,bgj->bgi", plan_BGSS, v_BGS))
            v_BGS = share(torch.einsum("bgij,bgi->bgj", plan_BGSS, u_BGS))
    return u_BGS * torch.einsum("bgij,bgj->bgi", plan_BGSS, v_BGS)


def to_unit(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """0 to 1, a new tensor; all 0 where all are equal."""
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return (values - low).div_((high - low).clamp_min(1e-9))


def places(features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column [G, S] of each token in its view or on the canvas, in tokens, and its distance to the centre."""
    layout, side = features.layout, features.layout.side
    row_GS, col_GS = layout.cell_N2[groups.index_GS].float().unbind(-1)
    rows, cols = layout.canvas
    if len(groups.index_GS) == layout.n_views:
        row_GS, col_GS, rows, cols = row_GS % side, col_GS % side, side, side
    else:
        is_global_GS = (layout.role_N == int(Role.GLOBAL))[groups.index_GS]
        row_GS = torch.where(is_global_GS, (row_GS + 0.5) * (rows / side) - 0.5, row_GS)
        col_GS = torch.where(is_global_GS, (col_GS + 0.5) * (cols / side) - 0.5, col_GS)
    return row_GS, col_GS, torch.hypot(row_GS - (rows - 1) / 2, col_GS - (cols - 1) / 2)
