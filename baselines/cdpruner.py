"""CDPruner: a determinantal point process conditioned on the question (Zhang et al., NeurIPS 2025, 2506.10967)."""

from typing import Literal

import torch
from torch import Tensor

from baselines.groups import Groups, GroupSelector, Scope
from shirg import Budget, VisionFeatures
from shirg.knobs import one_of
from shirg.scoring import normalise

EPS = 1e-5
"""What is left of a token below this is rounding: it lies in the span of what was picked."""


class CDPruner(GroupSelector):
    """Greedy MAP of a DPP with the kernel L = diag(r) cos(x_i, x_j) diag(r): relevant tokens that differ.

    r is the relevance of the question, brought to 0..1 over the picture's valid tokens. A pick j adds one row to the
    Cholesky factor, e = (L_j - c_j . c) / d_j, and takes e^2 from what is left of every token, d^2. Where nothing is
    left of any token (more picks than the width of the tokens allows), the rest goes by relevance.

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
        kernel_BGSS = x_BGSD @ x_BGSD.transpose(-1, -2)
        start_BGS = kernel_BGSS.diagonal(dim1=-2, dim2=-1).clone()
        left_BGS, open_BGS = start_BGS.clone(), groups.valid_BGS.clone()
        chosen_BGS = torch.zeros_like(open_BGS)
        b, g, s = open_BGS.shape
        factor_BGKS = x_BGSD.new_zeros(b, g, groups.most, s)
        for step in range(groups.most):
            gain_BGS = torch.where(left_BGS > EPS, left_BGS, start_BGS - 2).masked_fill(~open_BGS, -torch.inf)
            pick_BG1 = gain_BGS.argmax(-1, keepdim=True)
            chosen_BGS = chosen_BGS.scatter(-1, pick_BG1, step < groups.quota_BG[..., None]) | chosen_BGS
            open_BGS = open_BGS.scatter(-1, pick_BG1, False)
            d2_BG1 = left_BGS.gather(-1, pick_BG1)
            row_BGS = kernel_BGSS.gather(2, pick_BG1[..., None].expand(-1, -1, -1, s)).squeeze(2)
            if step:
                done_BGKS = factor_BGKS[:, :, :step]
                own_BG1K = done_BGKS.gather(-1, pick_BG1[..., None].expand(-1, -1, step, -1)).transpose(-1, -2)
                row_BGS = row_BGS - (own_BG1K @ done_BGKS).squeeze(2)
            e_BGS = torch.where(d2_BG1 > EPS, row_BGS / d2_BG1.clamp_min(EPS).sqrt(), 0.0)
            left_BGS = left_BGS - e_BGS.square()
            factor_BGKS[:, :, step] = e_BGS
        return chosen_BGS, r_BGS1.squeeze(-1)
