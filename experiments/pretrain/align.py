"""Stage "align": the projector learns to write a token as the sum of the words for what it shows.

The stand-in for LaViDa's first stage, which trains the projector alone on unpooled tokens. A linear target is what
makes the later average of four tokens a bag of their words and not noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data.synthetic.glyphs.vocabulary import COLOURS
from experiments.data.tokenizer import glyph_tokens
from experiments.pretrain.regions import N_CHARS, Regions
from lavida_adapter import Lavida
from lavida_adapter.module import OptimConfig, Trainable


class Align(Trainable):
    def __init__(self, model: Lavida, optim: OptimConfig, seed: int) -> None:
        super().__init__(model, optim, seed)
        model.requires_grad_(False)
        model.model.mm_projector.requires_grad_(True)
        words = glyph_tokens(model.tokenizer)
        ids = [*words.char[:N_CHARS], *words.colour, *words.shape]
        self.class_CD = model.lm.wte.weight[torch.tensor(ids)].detach().clone()
        self.blank_D = model.lm.wte.weight[words.blank].detach().clone()

    def loss(self, batch: Regions, generator: torch.Generator) -> Tensor:
        return F.mse_loss(self._projected(batch), self.target(batch.share_BNC))

    def target(self, share_BNC: Tensor) -> Tensor:
        """Word sums [B, N, D]; cells without any class count as blanks, global tokens are the mean over their cells."""
        kinds = share_BNC.split([N_CHARS, len(COLOURS), share_BNC.shape[-1] - N_CHARS - len(COLOURS)], dim=-1)
        filled = torch.stack([kind.sum(-1) for kind in kinds]).amax(0)
        return share_BNC @ self.class_CD + (1 - filled)[..., None] * self.blank_D

    def _projected(self, batch: Regions) -> Tensor:
        with torch.no_grad():
            states, _ = self.model.model.vision_tower(batch.pixels)
        projected: Tensor = self.model.model.mm_projector(states)
        return projected.view(*batch.share_BNC.shape[:2], -1)

    @torch.no_grad()
    def gate(self) -> dict[str, float]:
        """Share of the target's variance that the projector explains, on fresh pictures."""
        from experiments.pretrain.regions import draw_regions

        regions = draw_regions(self.model, self.seed + 1, 0, 16)
        target = self.target(regions.share_BNC)
        rest = F.mse_loss(self._projected(regions), target)
        return {"explained": 1 - (rest / target.var()).item()}
