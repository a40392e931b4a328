"""TopV: tokens that carry the most of an optimal transport plan stay (Yang et al., CVPR 2025, arXiv 2503.18278).

A reconstruction: the authors' code is not public, and their constants and constraint set are not given where we could
read them (docs/method.md, "topv").
"""

from typing import Literal

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, spread, take
from shirg import Budget, Role, UserError, VisionFeatures, assert_finite, gather_tokens
from shirg.validation import one_of

Marginals = Literal["semi_relaxed", "balanced_cols_last"]
Importance = Literal["total", "own"]
SINKHORN_STEPS = 3
ROWS = 512
"""Rows of a plan that are processed at a time, so that they stay in a CPU's cache."""
UNDERFLOW = 200.0
"""exp(-UNDERFLOW) is 0 in float32."""


class TopV(GroupSelector):
    """Keeps the sources of the most transported mass, and a few of the others at even distances.

    Sources s are the states that enter a layer, targets t the normed states between its attention and its MLP.

        cost_ij = alpha |s_i - t_j|^2 + beta (1 - exp(-distance_ij^2 / 2 sigma^2)) + gamma (distance of i to the centre)

    with each factor brought to 0..1. G = exp(-cost / eps), and the importance of i is the mass that the plan takes from
    it. In a balanced plan that mass is prescribed, so it does not depend on the picture; hence "semi_relaxed", where
    only targets receive a prescribed mass: P_ij = G_ij / sum_i G_ij. The mass that a source gives to all targets is
    large where many tokens are alike; what it gives to its own target, P_ii, is large where no other could give it.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the canvas and the global view, scaled up to it, as one.
        marginals: "balanced_cols_last" is three Sinkhorn steps that end with columns; its importances differ little.
        importance: "total", the mass a source gives to all targets, as published; "own", what it gives to its own.
        layer: an index into the tower's layers (from the end if negative), or a share of its depth.
        alpha, beta, gamma: weights of features, relative position and distance to the centre.
        sigma: in tokens.
        eps: temperature of the plan.
        recover: share of the budget for tokens that the ranking would prune, taken evenly in reading order.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        scope: Scope = "per_view",
        marginals: Marginals = "semi_relaxed",
        importance: Importance = "total",
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
        if min(alpha, beta, gamma) < 0 or alpha + beta + gamma == 0:
            raise UserError(f"alpha={alpha}, beta={beta}, gamma={gamma}: give numbers >= 0, one of them larger")
        if min(sigma, eps) <= 0 or not 0 <= recover < 1:
            raise UserError(f"sigma={sigma}, eps={eps}, recover={recover}: give sigma, eps > 0 and 0 <= recover < 1")
        self.marginals: Marginals = marginals
        self.importance: Importance = importance
        self.layer = layer
        self.taps = (f"input@{layer}", f"post_norm@{layer}")
        self.needs = frozenset(self.taps)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.sigma, self.eps, self.recover = sigma, eps, recover

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        importance_BGS = self.rate(features, groups)
        again_BG = (self.recover * groups.quota_BG).ceil().long()
        ranked_BGS = importance_BGS.masked_fill(~groups.valid_BGS, float("-inf"))
        top_BGS = take(ranked_BGS, groups.quota_BG - again_BG)
        return top_BGS | spread(groups.valid_BGS & ~top_BGS, again_BG), importance_BGS

    def rate(self, features: VisionFeatures, groups: Groups) -> Tensor:
        """Importance [B, G, S] of each source, in units of the mass that a target receives; 0 in padding."""
        valid_BGS = groups.valid_BGS
        # Padding is replaced by the first valid token of its group, so that it changes no minimum or maximum.
        position_BGS = torch.arange(valid_BGS.shape[-1], device=valid_BGS.device).expand_as(valid_BGS)
        position_BGS = torch.where(valid_BGS, position_BGS, valid_BGS.to(torch.uint8).argmax(-1, keepdim=True))
        token_BN = groups.index_GS.expand_as(position_BGS).gather(-1, position_BGS).flatten(1)
        source, target = (
            torch.unflatten(gather_tokens(features.taps[tap], token_BN).float(), 1, valid_BGS.shape[1:])
            for tap in self.taps
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
        u_BGS, v_BGS = scaling(cost, valid_BGS, self.marginals)
        if self.importance == "own":
            rated_BGS = u_BGS * cost.diagonal(dim1=-2, dim2=-1) * v_BGS
        else:
            rated_BGS = u_BGS * (v_BGS[..., None, :] @ cost).squeeze(-2)
        assert_finite(rated_BGS, valid_BGS, type(self).__name__)
        return rated_BGS


def squared_distances(a_BGMD: Tensor, b_BGSD: Tensor) -> Tensor:
    """|a_i - b_j|^2 [B, G, M, S] by one product, with the squares as two more channels."""
    ones_a, ones_b = torch.ones_like(a_BGMD[..., :1]), torch.ones_like(b_BGSD[..., :1])
    a = torch.cat([-2 * a_BGMD, a_BGMD.square().sum(-1, keepdim=True), ones_a], dim=-1)
    b = torch.cat([b_BGSD, ones_b, b_BGSD.square().sum(-1, keepdim=True)], dim=-1)
    return a @ b.transpose(-1, -2)


def scaling(kernel_BGSS: Tensor, valid_BGS: Tensor, marginals: Marginals) -> tuple[Tensor, Tensor]:
    """u and v [B, G, S] that make v_j kernel_ji u_i the plan; each valid target (row) receives a mass of 1."""
    weight_BGS = valid_BGS.float()

    def share(total_BGS: Tensor) -> Tensor:
        return torch.where(total_BGS > 0, weight_BGS / total_BGS.clamp_min(torch.finfo(torch.float32).tiny), 0.0)

    u_BGS = weight_BGS
    v_BGS = share((kernel_BGSS @ u_BGS[..., None]).squeeze(-1))
    if marginals == "balanced_cols_last":
        for _ in range(SINKHORN_STEPS - 1):
            u_BGS = share((v_BGS[..., None, :] @ kernel_BGSS).squeeze(-2))
            v_BGS = share((kernel_BGSS @ u_BGS[..., None]).squeeze(-1))
    return u_BGS, v_BGS


def to_unit(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """0 to 1, a new tensor; all 0 where all are equal."""
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return (values - low).div_((high - low).clamp_min(1e-9))


def grid_positions(features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
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
