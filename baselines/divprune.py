"""DivPrune: the subset whose closest pair is as far apart as can be (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

import torch
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, Space, gram, picked, rows, stage_of
from shirg import Budget, VisionFeatures


class DivPrune(GroupSelector):
    """Max-min diversity by greedy picks: always the token that is farthest from all that were picked.

    Distance is 1 - cosine. The first pick is the token with the farthest nearest neighbour. The distance to the nearest
    pick is carried along, so that a pick costs one row of the distances. Of equal distances the first token in reading
    order is taken; none is taken twice, also where only duplicates are left (the authors' code may repeat one).

    Args:
        budget: tokens per picture.
        scope: each view by itself, or the whole picture, as in the paper, which has one view.
        space: "projected", distances between projected tokens, as in the paper; the stage is then "post". "encoder",
            ours: distances between encoder states.
    """

    def __init__(self, *, budget: Budget, scope: Scope = "per_view", space: Space = "projected") -> None:
        super().__init__(budget=budget, scope=scope)
        self.space: Space = space
        self.stage = stage_of(space)

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        apart_BGSS = gram(self.unit_tokens(features, groups)).neg_().add_(1)
        apart_BGSS.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        apart_BGSS += torch.where(groups.valid_BGS, 0.0, torch.inf)[..., None, :]
        nearest_BGS = apart_BGSS.amin(-1).masked_fill(~groups.valid_BGS, -torch.inf)
        picks = []
        for step in range(groups.most):
            pick_BG1 = nearest_BGS.argmax(-1, keepdim=True)
            picks.append(pick_BG1)
            row_BGS = rows(apart_BGSS, pick_BG1).squeeze(2)
            nearest_BGS = row_BGS if step == 0 else torch.minimum(nearest_BGS, row_BGS)
            if step == 0:
                nearest_BGS = nearest_BGS.masked_fill(~groups.valid_BGS, -torch.inf)
            nearest_BGS = nearest_BGS.scatter(-1, pick_BG1, -torch.inf)
        return picked(torch.cat(picks, dim=-1), groups), None
