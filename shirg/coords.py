"""Telling the language model where a token sits (docs/method.md, "Coordinate embedding")."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from shirg.errors import UserError
from shirg.selection import Selection, Source

FREQUENCIES = 16


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
