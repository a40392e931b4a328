"""CDPruner: a determinantal point process conditioned on the question (Zhang et al., NeurIPS 2025, 2506.10967)."""

from typing import Literal

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, Space, gram, picked, stage_of
from shirg import Budget, VisionFeatures
from shirg.validation import one_of

ROUNDING = 1e-6
"""A remainder d^2 below this share of the token's own L_jj is rounding: the token lies in the span of the picks."""
OFFSET = 1e-6
"""Added to the relevance above the lowest, as in the authors' code: the least relevant token is not quite worthless."""


class CDPruner(GroupSelector):
    """Greedy MAP of a DPP with the kernel L = diag(r) cos(x_i, x_j) diag(r): relevant tokens that differ.

    r is the relevance of the question, brought to 0..1 over the picture's valid tokens. A pick j adds one row to the
    Cholesky factor, e = (L_j - c_j . c) / d_j, and subtracts e^2 from the remainder d^2 of every token. Where no
    token has a remainder, after as many picks as the tokens are wide at the latest, the others are picked by relevance
    (the authors' code returns fewer tokens).

    Args:
        budget: tokens per picture.
        scope: each view by itself, as the authors' code does where a picture has several, or the whole picture.
        space: "projected", cosines between projected tokens, as in the authors' code; this is then a selector of stage
            "post". "encoder", ours: cosines between encoder states.
        sign: 1 prefers tokens that resemble the question. -1 is the sign in the authors' code, which negates CLIP's
            cosine because patches of CLIP resemble the text where the object is not; relevance=lm_embed is another
            space, where resembling means resembling (docs/method.md, "cdpruner").
    """

    uses_relevance: bool = True

    def __init__(self, *, budget: Budget, scope: Scope = "per_view", space: Space = "projected", sign: int = 1) -> None:
        super().__init__(budget=budget, scope=scope)
        one_of("sign", sign, Literal[-1, 1])
        self.space: Space = space
        self.stage = stage_of(space)
        self.sign = sign

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        assert features.relevance_BN is not None
        r_BN = weights(self.sign * features.relevance_BN, features.valid_BN)
        r_BGS1 = self.finite(groups(r_BN)[..., None], groups)
        x_BGSD = self.unit_tokens(features, groups) * r_BGS1
        kernel_BGSS = gram(x_BGSD)
        own_BGS = kernel_BGSS.diagonal(dim1=-2, dim2=-1)
        spent_BGS, left_BGS = ROUNDING * own_BGS, own_BGS.masked_fill(~groups.valid_BGS, -torch.inf)
        spanned_BGS = left_BGS - 2
        b, g, s = left_BGS.shape
        factor_XKS = x_BGSD.new_zeros(b * g, groups.most, s)
        table_YS, first_X1 = kernel_BGSS.view(-1, s), s * torch.arange(b * g, device=left_BGS.device)[:, None]
        picks = []
        for step in range(groups.most):
            if step >= x_BGSD.shape[-1]:  # every token lies in the span, whatever rounding has left of it
                picks.append(spanned_BGS.argmax(-1, keepdim=True))
                spanned_BGS = spanned_BGS.scatter(-1, picks[-1], -torch.inf)
                continue
            is_free_BGS = left_BGS > spent_BGS
            pick_BG1 = torch.where(is_free_BGS, left_BGS, spanned_BGS).argmax(-1, keepdim=True)
            picks.append(pick_BG1)
            d2_BG1, is_free_BG1 = left_BGS.gather(-1, pick_BG1), is_free_BGS.gather(-1, pick_BG1)
            pick_X1 = pick_BG1.view(-1, 1)
            row_X1S = table_YS.index_select(0, (first_X1 + pick_X1).squeeze(-1)).unsqueeze(1)
            if step:
                done_XKS = factor_XKS[:, :step]
                own_XK1 = done_XKS.gather(-1, pick_X1[..., None].expand(-1, step, -1))
                row_X1S = torch.baddbmm(row_X1S, own_XK1.transpose(-1, -2), done_XKS, alpha=-1)
            e_BGS = row_X1S.view(b, g, s) * torch.where(is_free_BG1, d2_BG1, 1.0).rsqrt() * is_free_BG1
            left_BGS = torch.addcmul(left_BGS, e_BGS, e_BGS, value=-1).scatter_(-1, pick_BG1, -torch.inf)
            spanned_BGS = spanned_BGS.scatter_(-1, pick_BG1, -torch.inf)
            factor_XKS[:, step] = e_BGS.flatten(0, 1)
        return picked(torch.cat(picks, dim=-1), groups), r_BGS1.squeeze(-1)


def weights(relevance_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Relevance [B, N] from 0 (nearly) to 1 over the valid tokens, all 1 where it is constant; 0 in padding."""
    relevance_BN = relevance_BN.float()
    low_B1 = relevance_BN.masked_fill(~valid_BN, torch.inf).amin(-1, keepdim=True)
    high_B1 = relevance_BN.masked_fill(~valid_BN, -torch.inf).amax(-1, keepdim=True)
    r_BN = (relevance_BN - low_B1 + OFFSET) / (high_B1 - low_B1).clamp_min(OFFSET)
    return torch.where(valid_BN, r_BN, 0.0)
