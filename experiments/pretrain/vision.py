"""Stage "vision": the tower learns to tell glyphs, colours and shapes apart, token by token.

A sigmoid loss between token states and a table of class vectors: the region-level cousin of SigLIP's picture-text loss
(Zhai et al. 2023, arXiv 2303.15343). Head and table are dropped afterwards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.pretrain.regions import N_CHARS, N_CLASSES, Regions, draw_regions
from lavida_adapter import Lavida
from lavida_adapter.module import OptimConfig, Trainable


class VisionPretraining(Trainable):
    def __init__(self, model: Lavida, optim: OptimConfig, seed: int) -> None:
        super().__init__(model, optim, seed)
        width = model.config.vision.hidden_size
        model.requires_grad_(False)
        model.model.vision_tower.requires_grad_(True)
        model.model.vision_tower.vision_tower.vision_model.post_layernorm.requires_grad_(False)  # never applied
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.table = nn.Parameter(torch.randn(N_CLASSES, width) * width**-0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def logits(self, regions: Regions) -> Tensor:
        states, _ = self.model.model.vision_tower(regions.pixels)
        query = F.normalize(self.head(states), dim=-1)
        scores = query @ F.normalize(self.table, dim=-1).T
        return (scores * self.scale.exp() + self.bias).view(*regions.share_BNC.shape)

    def loss(self, batch: Regions, generator: torch.Generator) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logits(batch), (batch.share_BNC > 0).float()) * N_CLASSES

    @torch.no_grad()
    def gate(self, pictures: int = 64) -> dict[str, float]:
        """Share of glyphs whose character is named right, by tile tokens and by global tokens, on fresh pictures."""
        regions = draw_regions(self.model, self.seed + 1, 0, pictures)
        named = self.logits(regions)[..., :N_CHARS].argmax(-1)
        share = regions.share_BNC[..., :N_CHARS]
        right = share.gather(-1, named[..., None])[..., 0] > 0
        shown = share.amax(-1) > 0
        tile = regions.is_tile_N
        return {
            "tile_chars": right[:, tile][shown[:, tile]].float().mean().item(),
            "global_chars": right[:, ~tile][shown[:, ~tile]].float().mean().item(),
        }
