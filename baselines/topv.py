"""TopV: tokens that carry the most of an optimal transport plan stay (Yang et al., CVPR 2025, arXiv 2503.18278).

The authors' code is not public. The default follows the one public reproduction that we found; "semi_relaxed" and "own"
are our own readings (docs/method.md, "topv").
"""

from typing import Literal

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, spread, take
from shirg import Budget, Role, Share, UserError, VisionFeatures, assert_finite, gather_tokens
from shirg.validation import one_of

Marginals = Literal["norm", "norm_cols_last", "uniform", "semi_relaxed"]
Importance = Literal["total", "own"]
Target = Literal["output", "post_norm"]
SINKHORN_STEPS = 3
ROW_UPDATES: dict[Marginals, int] = {"norm": 3, "norm_cols_last": 2, "uniform": 2, "semi_relaxed": 0}
"""How often the rows of a plan, its sources, are brought to their marginals; the columns three times, or once."""
ROWS = 512
"""Rows of a plan that are processed at a time, so that they stay in a CPU's cache."""
UNDERFLOW = 200.0
"""exp(-UNDERFLOW) is 0 in float32."""


class TopV(GroupSelector):
    """Keeps the sources of the most transported mass, and a few of the others at even distances.

    Sources s are the states that enter a layer, targets t the states that leave it, or the normed ones between its
    attention and its MLP.

        cost_ij = alpha |s_i - t_j|^2 + beta (1 - exp(-distance_ij^2 / 2 sigma^2)) + gamma (distance of i to the centre)

    with each factor brought to 0..1. G = exp(-cost / eps) is scaled to a plan P_ij = u_i G_ij v_j; rows are sources,
    its columns targets. Three times columns, then rows are brought to their marginals. After rows, the mass that leaves
    a source is its marginal. So with marginals="norm" and importance="total" the ranking is that of the sources' norms,
    whatever the cost; no plan is computed then, and options of the cost are refused.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the canvas and the global view, scaled up to it, as one.
        marginals: "norm", masses in proportion to the L2 norms of sources and targets, rows last, as in the public
            reproduction; "norm_cols_last", without the last update of the rows; "uniform", equal masses, without the
            last update of the rows (with it, all sources would be equal); "semi_relaxed", our reading: targets receive
            equal masses, and sources are free, P_ij = G_ij / sum_i G_ij.
        importance: "total", the mass a source gives to all targets; "own", P_ii, what it gives to its own target, which
            is ours.
        target: "output", the states that leave the layer, as in the public reproduction; "post_norm", as in the paper's
            abstract.
        layer: an index into the tower's layers (from the end if negative), or a share of its depth.
        alpha, beta, gamma: weights of features, relative position and distance to the centre.
        sigma: in tokens.
        eps: temperature of the plan.
        recover: share of the budget for tokens that the ranking would prune, taken evenly in reading order; ours.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        marginals: Marginals = "norm",
        importance: Importance = "total",
        target: Target = "output",
        layer: int | float = -1,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.01,
        sigma: float = 10.0,
        eps: float = 0.1,
        recover: float = 0.1,
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        one_of("marginals", marginals, Marginals)
        one_of("importance", importance, Importance)
        one_of("target", target, Target)
        if min(alpha, beta, gamma) < 0 or alpha + beta + gamma == 0:
            raise UserError(f"alpha={alpha}, beta={beta}, gamma={gamma}: give numbers >= 0, one of them larger")
        if min(sigma, eps) <= 0 or not 0 <= recover < 1:
            raise UserError(f"sigma={sigma}, eps={eps}, recover={recover}: give sigma, eps > 0 and 0 <= recover < 1")
        if beta == 0 and sigma != 10.0:
            raise UserError("sigma has no effect with beta=0, which leaves positions out; leave it at its default")
        self.marginals: Marginals = marginals
        self.importance: Importance = importance
        self.layer = layer
        self.is_norm_ranking = marginals == "norm" and importance == "total"
        if self.is_norm_ranking and (target, alpha, beta, gamma, sigma, eps) != ("output", 1.0, 1.0, 0.01, 10.0, 0.1):
            raise UserError(
                "target, alpha, beta, gamma, sigma and eps have no effect with marginals=norm and importance=total, "
                "which rank sources by their norm; leave them at their defaults or choose another marginals"
            )
        self.target: Target = target
        self.source_tap, self.target_tap = f"input@{layer}", f"{target}@{layer}"
        self.needs = frozenset({self.source_tap} if self.is_norm_ranking else {self.source_tap, self.target_tap})
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.sigma, self.eps, self.recover = sigma, eps, recover
        self.again = Share.of(recover)

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        importance_BGS = self.rate(features, groups)
        again_BG = self.again.up(groups.quota_BG)
        ranked_BGS = importance_BGS.masked_fill(~groups.valid_BGS, float("-inf"))
        top_BGS = take(ranked_BGS, groups.quota_BG - again_BG)
        return top_BGS | spread(groups.valid_BGS & ~top_BGS, again_BG), importance_BGS

    def rate(self, features: VisionFeatures, groups: Groups) -> Tensor:
        """Importance [B, G, S] of each source, in units of the mean mass of a target; 0 in padding."""
        if self.is_norm_ranking:
            rated_BGS = norm_masses(groups(features.taps[self.source_tap]), groups.valid_BGS)
        else:
            rated_BGS = self.transported(features, groups)
        assert_finite(rated_BGS, groups.valid_BGS, type(self).__name__)
        return rated_BGS

    def transported(self, features: VisionFeatures, groups: Groups) -> Tensor:
        """The same, by the plan."""
        valid_BGS = groups.valid_BGS
        # Padding is replaced by the first valid token of its group, so that it changes no minimum or maximum.
        position_BGS = torch.arange(valid_BGS.shape[-1], device=valid_BGS.device).expand_as(valid_BGS)
        position_BGS = torch.where(valid_BGS, position_BGS, valid_BGS.to(torch.uint8).argmax(-1, keepdim=True))
        token_BN = groups.index_GS.expand_as(position_BGS).gather(-1, position_BGS).flatten(1)
        source, target = (
            torch.unflatten(gather_tokens(features.taps[tap], token_BN).float(), 1, valid_BGS.shape[1:])
            for tap in (self.source_tap, self.target_tap)
        )
        row_BGS, col_BGS, off_BGS = (
            x.expand_as(valid_BGS).gather(-1, position_BGS) for x in grid_positions(features, groups)
        )
        # [.., target, source]: the plan is normalised over the last axis. What depends on the target alone cancels out.
        cost = squared_distances(target, source)
        least, most = (reduce(cost, (-2, -1), keepdim=True) for reduce in (torch.amin, torch.amax))
        feature = self.alpha / (most - least).clamp_min(1e-9)
        position_BGS2, width = torch.stack([row_BGS, col_BGS], dim=-1), -2 * self.sigma**2
        near = [squared_distances(part, position_BGS2).div_(width).exp_() for part in position_BGS2.split(ROWS, dim=-2)]
        spatial = self.beta / (1 - torch.stack([part.amin((-2, -1)) for part in near]).amin(0)).clamp_min(1e-9)
        never = self.alpha + self.beta + self.gamma + UNDERFLOW * self.eps
        own_BG1S = torch.where(valid_BGS, self.gamma * to_unit(off_BGS, (-1,)), never)[..., None, :]
        for part, near_part in zip(cost.split(ROWS, dim=-2), near, strict=True):
            part.mul_(feature).addcmul_(near_part, -spatial[..., None, None]).add_(own_BG1S).div_(-self.eps)
            part.copy_(part.softmax(-1))
        if self.marginals in ("norm", "norm_cols_last"):
            leaving_BGS, arriving_BGS = (norm_masses(x, valid_BGS) for x in (source, target))
        else:
            leaving_BGS = arriving_BGS = valid_BGS.float()
        u_BGS, v_BGS = scaling(cost, leaving_BGS, arriving_BGS, ROW_UPDATES[self.marginals])
        if self.importance == "own":
            return u_BGS * cost.diagonal(dim1=-2, dim2=-1) * v_BGS
        return u_BGS * (v_BGS[..., None, :] @ cost).squeeze(-2)


def squared_distances(a_BGMD: Tensor, b_BGSD: Tensor) -> Tensor:
    """|a_i - b_j|^2 [B, G, M, S] by one product, with the squares as two more channels."""
    ones_a, ones_b = torch.ones_like(a_BGMD[..., :1]), torch.ones_like(b_BGSD[..., :1])
    a = torch.cat([-2 * a_BGMD, a_BGMD.square().sum(-1, keepdim=True), ones_a], dim=-1)
    b = torch.cat([b_BGSD, ones_b, b_BGSD.square().sum(-1, keepdim=True)], dim=-1)
    return a @ b.transpose(-1, -2)


def norm_masses(x_BGSD: Tensor, valid_BGS: Tensor) -> Tensor:
    """Masses [B, G, S] in proportion to the lengths of states, 1 on average; 0 in padding."""
    norm_BGS = x_BGSD.float().norm(dim=-1).masked_fill(~valid_BGS, 0)
    return norm_BGS * (valid_BGS.sum(-1, keepdim=True) / norm_BGS.sum(-1, keepdim=True).clamp_min(1e-9))


def scaling(kernel_BGSS: Tensor, leaving_BGS: Tensor, arriving_BGS: Tensor, row_updates: int) -> tuple[Tensor, Tensor]:
    """u and v [B, G, S] that make v_j kernel_ji u_i the plan.

    `leaving` and `arriving` are the masses of sources and targets, 0 in padding. Columns of the plan (targets) are
    brought to their masses, then rows (sources), three times at most; the plan ends with the columns where there are
    fewer updates of rows. Without any, sources are free.
    """

    def share(mass_BGS: Tensor, total_BGS: Tensor) -> Tensor:
        return torch.where(total_BGS > 0, mass_BGS / total_BGS.clamp_min(torch.finfo(torch.float32).tiny), 0.0)

    u_BGS = (leaving_BGS > 0).float()
    v_BGS = torch.zeros_like(u_BGS)
    for step in range(min(SINKHORN_STEPS, row_updates + 1)):
        v_BGS = share(arriving_BGS, (kernel_BGSS @ u_BGS[..., None]).squeeze(-1))
        if step < row_updates:
            u_BGS = share(leaving_BGS, (v_BGS[..., None, :] @ kernel_BGSS).squeeze(-2))
    return u_BGS, v_BGS


def to_unit(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """0 to 1, a new tensor; all 0 where all are equal."""
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return (values - low).div_((high - low).clamp_min(1e-9))


def grid_positions(features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column [G, S] of each token in its view or on the canvas, in tokens, and its distance to the centre."""
    layout, (view_rows, view_cols) = features.layout, features.layout.view_shape
    row_GS, col_GS = layout.cell_N2[groups.index_GS].float().unbind(-1)
    rows, cols = layout.canvas
    if len(groups.index_GS) == layout.n_views:
        row_GS, col_GS, rows, cols = row_GS % view_rows, col_GS % view_cols, view_rows, view_cols
    else:
        is_global_GS = (layout.role_N == int(Role.GLOBAL))[groups.index_GS]
        row_GS = torch.where(is_global_GS, (row_GS + 0.5) * (rows / view_rows) - 0.5, row_GS)
        col_GS = torch.where(is_global_GS, (col_GS + 0.5) * (cols / view_cols) - 0.5, col_GS)
    return row_GS, col_GS, torch.hypot(row_GS - (rows - 1) / 2, col_GS - (cols - 1) / 2)
