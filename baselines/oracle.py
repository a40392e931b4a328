"""The oracle: a control that knows where the evidence is (docs/method.md, "oracle")."""

import math

import torch
from torch import Tensor

from shirg import Budget, Role, Selector, UserError, VisionFeatures, dither


class Oracle(Selector):
    """Tokens that show the evidence first, the rest evenly over the picture: the ceiling of every selector.

    A token shows a box when its centre lies in it; a box between the centres is shown by the nearest token. Only the
    finest grid counts: the tiles, or the global view of a picture without tiles. Both parts follow the order
    of `uniform_grid`.

    Raises:
        UserError: for a sample without boxes.
    """

    reads_sample = True

    def __init__(self, *, budget: Budget) -> None:
        super().__init__(budget=budget)

    def score(self, features: VisionFeatures) -> Tensor:
        layout = features.layout
        order_N = dither(layout.cell_N2)
        fine_N = layout.role_N != int(Role.GLOBAL) if layout.canvas != (0, 0) else torch.ones_like(layout.role_N) > 0
        shown_BN = self.shows(features, features.valid_BN & fine_N)
        return torch.where(shown_BN, 2.0, 0.0) - order_N / (1 + order_N.amax())

    def shows(self, features: VisionFeatures, eligible_BN: Tensor) -> Tensor:
        """bool [B, N]: which of the eligible tokens show a box."""
        boxes = self.boxes(features)
        most = max(len(boxes_of) for boxes_of in boxes)
        padded = [[*boxes_of, *[boxes_of[-1]] * (most - len(boxes_of))] for boxes_of in boxes]
        box_BM14 = torch.tensor(padded, dtype=torch.float64).to(eligible_BN.device, non_blocking=True)[:, :, None]
        token_B1N4 = features.box_BN4()[:, None].double()
        centre_B1N2 = (token_B1N4[..., :2] + token_B1N4[..., 2:]) / 2
        low, high = box_BM14[..., :2], box_BM14[..., 2:]
        inside_BMN = ((centre_B1N2 >= low) & (centre_B1N2 < high)).all(-1) & eligible_BN[:, None]
        away_BMN = (centre_B1N2 - (low + high) / 2).square().sum(-1).masked_fill(~eligible_BN[:, None], math.inf)
        nearest_BMN = torch.zeros_like(inside_BMN).scatter(-1, away_BMN.argmin(-1, keepdim=True), True)
        return torch.where(inside_BMN.any(-1, keepdim=True), inside_BMN, nearest_BMN & eligible_BN[:, None]).any(1)

    def boxes(self, features: VisionFeatures) -> tuple[tuple[tuple[float, float, float, float], ...], ...]:
        boxes = features.boxes if features.boxes is not None else ((),) * len(features.ids)
        for sample, known in zip(features.ids, boxes, strict=True):
            if not known:
                raise UserError(
                    f"Oracle needs to know where the evidence is, and sample {sample!r} has no boxes: pass boxes=, "
                    "choose data with boxes, or another selector"
                )
        return boxes
