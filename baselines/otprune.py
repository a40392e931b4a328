"""OTPrune: tokens whose distribution is close to that of all (Chen et al., CVPR 2026, arXiv 2602.20205)."""

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Space, gram, picked, rows, stage_of
from shirg import Budget, UserError, VisionFeatures
from shirg.scoring import unit


class OTPrune(GroupSelector):
    """Greedy picks that make the determinant of a kernel's minor largest, in each view by itself.

    V [n, D] holds a view's tokens, each channel scaled to length 1 over the tokens. With G = V V^T the kernel is

        K = I + gamma G G^T

    and the next pick is the token that makes log det K_SS of the picks S largest. A pick j adds one row to the Cholesky
    factor, e = (K_j - c_j . c) / d_j, and subtracts e^2 from the remainder d^2 of every token. No remainder is below 1,
    because I is added. Of equal remainders the first token in reading order is taken.

    There is no scope: G G^T of a whole picture would take much longer than all of its views.

    Args:
        budget: tokens per picture.
        gamma: weight of G G^T; 0.01 in the authors' code.
        space: whether V holds projected tokens, as in the authors' code, or encoder states; then only selected tokens
            are projected.
    """

    def __init__(self, *, budget: Budget, gamma: float = 0.01, space: Space = "projected") -> None:
        super().__init__(budget=budget)
        if gamma <= 0:
            raise UserError(f"gamma={gamma}: give a number above 0, or every token is worth the same")
        self.gamma, self.space = gamma, space
        self.stage = stage_of(space)

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        kernel_BGSS = self.kernel(features, groups)
        left_BGS = kernel_BGSS.diagonal(dim1=-2, dim2=-1).masked_fill(~groups.valid_BGS, -torch.inf)
        b, g, s = left_BGS.shape
        factor_BGKS = kernel_BGSS.new_zeros(b, g, groups.most, s)
        picks = []
        for step in range(groups.most):
            pick_BG1 = left_BGS.argmax(-1, keepdim=True)
            picks.append(pick_BG1)
            row_BGS = rows(kernel_BGSS, pick_BG1).squeeze(2)
            if step:
                done_BGKS = factor_BGKS[:, :, :step]
                own_BGK1 = done_BGKS.gather(-1, pick_BG1[..., None].expand(-1, -1, step, -1))
                row_BGS = row_BGS - (own_BGK1.transpose(-1, -2) @ done_BGKS).squeeze(2)
            # Where a view has no token left, the remainder is -inf and the pick is not used.
            e_BGS = row_BGS * left_BGS.gather(-1, pick_BG1).clamp_min(1).rsqrt()
            left_BGS = torch.addcmul(left_BGS, e_BGS, e_BGS, value=-1).scatter_(-1, pick_BG1, -torch.inf)
            factor_BGKS[:, :, step] = e_BGS
        return picked(torch.cat(picks, dim=-1), groups), None

    def kernel(self, features: VisionFeatures, groups: Groups) -> Tensor:
        """K [B, G, S, S]; padding is a row and a column of the unit matrix."""
        x_BGSD = groups(features.tokens_BND).float().masked_fill(~groups.valid_BGS[..., None], 0)
        v_BGSD = self.finite(unit(x_BGSD.transpose(-1, -2)).transpose(-1, -2).contiguous(), groups)
        kernel_BGSS = gram(gram(v_BGSD)).mul_(self.gamma)
        kernel_BGSS.diagonal(dim1=-2, dim2=-1).add_(1)
        return kernel_BGSS
