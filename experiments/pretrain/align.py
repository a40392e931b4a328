"""Stage "align": the projector learns to write a token as the sum of the words for what it shows.

The stand-in for LaViDa's first stage, which trains the projector alone on unpooled tokens. A linear target is what
makes the later average of four tokens a bag of their words and not noise.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data.tokenizer import glyph_tokens, word_tokens
from experiments.pretrain.regions import CLASS, Regions, draw_regions
from lavida_adapter import Lavida
from lavida_adapter.module import OptimConfig, Trainable


class Align(Trainable):
    def __init__(self, model: Lavida, optim: OptimConfig, seed: int, pictures: Mapping[str, int]) -> None:
        super().__init__(model, optim, seed)
        self.pictures = dict(pictures)
        model.requires_grad_(False)
        model.model.mm_projector.requires_grad_(True)
        ids = word_tokens(model.tokenizer)
        self.class_CD = model.lm.wte.weight[torch.tensor([ids[word] for word in CLASS])].detach().clone()
        self.blank_D = model.lm.wte.weight[glyph_tokens(model.tokenizer).blank].detach().clone()

    def draw(self, step: int) -> Regions:
        return draw_regions(self.model, self.seed, step, self.pictures)

    def loss(self, batch: Regions, generator: torch.Generator) -> Tensor:
        return F.mse_loss(self._projected(batch), self.target(batch.share_BNC, batch.filled_BN))

    def target(self, share_BNC: Tensor, filled_BN: Tensor) -> Tensor:
        """Word sums [B, N, D]; cells without any class count as blanks, global tokens are the mean over their cells."""
        return share_BNC @ self.class_CD + (1 - filled_BN)[..., None] * self.blank_D

    def _projected(self, batch: Regions) -> Tensor:
        with torch.no_grad():
            states, _ = self.model.model.vision_tower(batch.pixels)
        projected: Tensor = self.model.model.mm_projector(states)
        return projected.view(*batch.share_BNC.shape[:2], -1)

    @torch.no_grad()
    def gate(self) -> dict[str, float]:
        """Share of the target's variance that the projector explains, on fresh pictures of each family."""
        figures = {}
        for family in self.pictures:
            regions = draw_regions(self.model, self.seed + 1, 0, {family: 16})
            target = self.target(regions.share_BNC, regions.filled_BN)
            rest = F.mse_loss(self._projected(regions), target)
            figures[family] = 1 - (rest / target.var()).item()
        return figures
