"""DivPrune: the subset whose closest pair is as far apart as can be (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

import torch
from torch import Tensor

from baselines.groups import Groups, GroupSelector, Scope
from shirg import Budget, VisionFeatures


class DivPrune(GroupSelector):
    """Max-min diversity by greedy picks: always the token that is farthest from all that were picked.

    Distance is 1 - cosine of encoder states (the paper measures tokens behind the projector; here only what is kept is
    projected). The first pick is the token with the farthest nearest neighbour. The distance to the nearest pick is
    carried along, so that a pick costs one row of the distances. Of equal distances the first token in reading order
    is taken.

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the whole picture, as in the paper, which has one view.
    """

    def __init__(self, *, budget: Budget, scope: Scope = "per_view") -> None:
        super().__init__(budget=budget, scope=scope)

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        x_BGSD = self.unit_tokens(features, groups)
        apart_BGSS = 1 - x_BGSD @ x_BGSD.transpose(-1, -2)
        apart_BGSS.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        apart_BGSS.masked_fill_(~groups.valid_BGS[..., None, :], torch.inf)
        nearest_BGS = apart_BGSS.amin(-1).masked_fill(~groups.valid_BGS, -torch.inf)
        chosen_BGS = torch.zeros_like(groups.valid_BGS)
        s = chosen_BGS.shape[-1]
        for step in range(groups.most):
            pick_BG1 = nearest_BGS.argmax(-1, keepdim=True)
            chosen_BGS = chosen_BGS.scatter(-1, pick_BG1, step < groups.quota_BG[..., None]) | chosen_BGS
            row_BGS = apart_BGSS.gather(2, pick_BG1[..., None].expand(-1, -1, -1, s)).squeeze(2)
            nearest_BGS = row_BGS if step == 0 else torch.minimum(nearest_BGS, row_BGS)
            if step == 0:
                nearest_BGS = nearest_BGS.masked_fill(~groups.valid_BGS, -torch.inf)
            nearest_BGS = nearest_BGS.scatter(-1, pick_BG1, -torch.inf)
        return chosen_BGS, None
