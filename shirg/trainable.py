"""The parts of SHIRG that can be trained: coordinate embedding, and the head of the adaptive budget.

docs/method.md, "Coordinate embedding" and "Budget by content". Both start as if they were not there; their weights are
saved with the adapter.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from shirg.budget import Share
from shirg.options import Adaptive
from shirg.selection import Selection, Source
from shirg.validation import UserError

FREQUENCIES = 16
"""Of each coordinate of a box."""
TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
"""Of the softmax over scores, one feature of the head for each."""


class CoordEmbed(nn.Module):
    """Sines and cosines of a box's centre and size, mapped linearly to the width of a token.

    The map starts at zero, so that an untrained embedding changes nothing.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * 2 * FREQUENCIES, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, box_BT4: Tensor) -> Tensor:
        """[B, T, width] of boxes (x0, y0, x1, y1) in fractions of the picture."""
        embedding: Tensor = self.linear(sincos(box_BT4).to(self.linear.weight.dtype))
        return embedding

    def added_to(self, selection: Selection) -> Selection:
        """The selection with the embedding on all tokens but newlines and unused slots."""
        tokens_BTD, width = selection.tokens_BTD, self.linear.out_features
        if tokens_BTD.shape[-1] != width:
            raise UserError(
                f"coord_width={width}, but the tokens are {tokens_BTD.shape[-1]} wide; set coord_width to that"
            )
        used_BT1 = (selection.mask_BT & (selection.source_BT != int(Source.NEWLINE)))[..., None]
        shift_BTD = self(selection.box_BT4) * used_BT1
        return replace(selection, tokens_BTD=tokens_BTD + shift_BTD.to(tokens_BTD.dtype))


def sincos(box_BT4: Tensor) -> Tensor:
    """[B, T, 128]: sines and cosines of (centre x, centre y, width, height), 16 frequencies from 1/2 to 32 periods."""
    low, high = box_BT4[..., :2].float(), box_BT4[..., 2:].float()
    values = torch.cat([(low + high) / 2, high - low], dim=-1)
    octave = torch.linspace(0, math.log(64), FREQUENCIES, device=box_BT4.device)
    angle = values[..., None] * (math.pi * octave.exp())
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def effective_number(scores_BP: Tensor, usable_BP: Tensor, temperature: float) -> Tensor:
    """exp(entropy) [B] of softmax(score / temperature): the effective number of relevant tokens."""
    logit_BP = (scores_BP / temperature).masked_fill(~usable_BP, -1e30)
    log_p_BP = logit_BP.log_softmax(-1)
    entropy_B = -(log_p_BP.exp() * log_p_BP.masked_fill(~usable_BP, 0.0)).sum(-1)
    return entropy_B.exp()


def level_by_entropy(scores_BP: Tensor, usable_BP: Tensor, count_BL: Tensor, temperature: float) -> Tensor:
    """Which [B] of rising counts is the first to hold the effective number of relevant tokens; else the last."""
    effective_B1 = effective_number(scores_BP, usable_BP, temperature)[:, None]
    too_small_BL = count_BL < effective_B1 * (1 - 1e-5)
    return too_small_BL.sum(-1).clamp_max(count_BL.shape[1] - 1)


class AdaptiveHead(nn.Module):
    """Predicts a loss for each level of the budget, and takes the smallest level with little more than the least loss.

    Its input is the share of tokens that are relevant, exp(entropy) / n, at four temperatures. Untrained, it predicts a
    lower loss for a larger budget, whatever the picture is, and so it keeps everything.
    """

    def __init__(self, options: Adaptive) -> None:
        super().__init__()
        self.tolerance = options.tolerance
        self.linear = nn.Linear(len(TEMPERATURES), len(options.levels))
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(1 - torch.tensor(options.levels))

    def forward(self, scores_BP: Tensor, usable_BP: Tensor, level: int | None = None) -> tuple[Tensor, Tensor]:
        """The level of each picture [B], and the loss that is predicted for it [B], float32 with a graph.

        `level` fixes the level of every picture, as in training.
        """
        scores_BP = scores_BP.detach()
        n_B = usable_BP.sum(-1).clamp_min(1)
        shares = [effective_number(scores_BP, usable_BP, t) / n_B for t in TEMPERATURES]
        share_BS = torch.stack(shares, dim=-1).to(self.linear.weight.dtype)
        expected_BL: Tensor = self.linear(share_BS).float()
        if level is None:
            good_BL = expected_BL <= expected_BL[:, -1:] + self.tolerance
            level_B = good_BL.to(torch.int64).argmax(-1)
        else:
            level_B = torch.full_like(n_B, level)
        return level_B, expected_BL.gather(1, level_B[:, None])[:, 0]


def adaptive_budget(
    options: Adaptive, head: AdaptiveHead | None, level: int | None, scores_BP: Tensor, usable_BP: Tensor, k_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Adaptive budget: how many of its own k tokens each picture keeps [B], and the loss that a head predicts [B].

    `level` is used instead of the level that the head would choose.
    """
    if options.mode == "none":
        return k_B, None
    shares = [Share.of(share) for share in options.levels]
    parts_2L = torch.tensor([[s.numerator for s in shares], [s.denominator for s in shares]])
    parts_2L = parts_2L.to(k_B.device, non_blocking=True)
    count_BL = (parts_2L[0] * k_B[:, None] // parts_2L[1]).clamp_min(1)
    if head is not None:
        level_B, expected_B = head(scores_BP, usable_BP, level)
        return count_BL.gather(1, level_B[:, None])[:, 0], expected_B
    with torch.no_grad():
        level_B = level_by_entropy(scores_BP, usable_BP, count_BL, options.temperature)
        return count_BL.gather(1, level_B[:, None])[:, 0], None
