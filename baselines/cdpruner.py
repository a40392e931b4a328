"""CDPruner: a determinantal point process conditioned on the question (Zhang et al., NeurIPS 2025, 2506.10967)."""

from typing import Literal

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, gram, picked
from shirg import Budget, VisionFeatures
from shirg.scoring import normalise
from shirg.validation import one_of

EPS = 1e-5
"""A remainder d^2 below this is rounding: the token lies in the span of what was picked."""


class CDPruner(GroupSelector):
    """Greedy MAP of a DPP with the kernel L = diag(r) cos(x_i, x_j) diag(r): relevant tokens that differ.

    r is the relevance of the question, brought to 0..1 over the picture's valid tokens. A pick j adds one row to the
    Cholesky factor, e = (L_j - c_j . c) / d_j, and subtracts e^2 from the remainder d^2 of every token. Where no
    token has a remainder (more picks than the width of the tokens allows), the others are picked by relevance.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the whole picture, as in the paper, which has one view.
        sign: 1 prefers tokens that resemble the question; -1 is the sign in the authors' code, which negates CLIP's
            cosine because patches of CLIP resemble the text where the object is not.
    """

    uses_relevance: bool = True

    def __init__(self, *, budget: Budget, scope: Scope = "per_view", sign: int = 1) -> None:
        super().__init__(budget=budget, scope=scope)
        one_of("sign", sign, Literal[-1, 1])
        self.sign = sign

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        assert features.relevance_BN is not None
        r_BN = normalise(self.sign * features.relevance_BN, features.valid_BN, "minmax")
        r_BGS1 = self.finite(groups(r_BN)[..., None], groups)
        x_BGSD = self.unit_tokens(features, groups) * r_BGS1
        kernel_BGSS = gram(x_BGSD)
        left_BGS = kernel_BGSS.diagonal(dim1=-2, dim2=-1).masked_fill(~groups.valid_BGS, -torch.inf)
        spanned_BGS = left_BGS - 2
        b, g, s = left_BGS.shape
        factor_XKS = x_BGSD.new_zeros(b * g, groups.most, s)
        table_YS, first_X1 = kernel_BGSS.view(-1, s), s * torch.arange(b * g, device=left_BGS.device)[:, None]
        picks = []
        for step in range(groups.most):
            pick_BG1 = torch.where(left_BGS > EPS, left_BGS, spanned_BGS).argmax(-1, keepdim=True)
            picks.append(pick_BG1)
            d2_BG1 = left_BGS.gather(-1, pick_BG1)
            pick_X1 = pick_BG1.view(-1, 1)
            row_X1S = table_YS.index_select(0, (first_X1 + pick_X1).squeeze(-1)).unsqueeze(1)
            if step:
                done_XKS = factor_XKS[:, :step]
                own_XK1 = done_XKS.gather(-1, pick_X1[..., None].expand(-1, step, -1))
                row_X1S = torch.baddbmm(row_X1S, own_XK1.transpose(-1, -2), done_XKS, alpha=-1)
            e_BGS = row_X1S.view(b, g, s) * d2_BG1.clamp_min(EPS).rsqrt().mul_(d2_BG1 > EPS)
            left_BGS = torch.addcmul(left_BGS, e_BGS, e_BGS, value=-1).scatter_(-1, pick_BG1, -torch.inf)
            spanned_BGS = spanned_BGS.scatter_(-1, pick_BG1, -torch.inf)
            factor_XKS[:, step] = e_BGS.flatten(0, 1)
        return picked(torch.cat(picks, dim=-1), groups), r_BGS1.squeeze(-1)
