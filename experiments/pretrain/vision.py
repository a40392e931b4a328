"""Stage "vision": the tower learns to name what each token shows: glyphs, colours, shapes, heights, keys of lines.

A sigmoid loss between token states and a table of class vectors: the region-level cousin of SigLIP's picture-text loss
(Zhai et al. 2023, arXiv 2303.15343). Head and table are dropped afterwards.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.pretrain.regions import CLASS, GROUPS, Regions, draw_regions
from lavida_adapter import Lavida
from lavida_adapter.module import OptimConfig, Trainable


class VisionPretraining(Trainable):
    def __init__(self, model: Lavida, optim: OptimConfig, seed: int, pictures: Mapping[str, int]) -> None:
        super().__init__(model, optim, seed)
        self.pictures = dict(pictures)
        width = model.config.vision.hidden_size
        model.requires_grad_(False)
        model.model.vision_tower.requires_grad_(True)
        model.model.vision_tower.vision_tower.vision_model.post_layernorm.requires_grad_(False)  # never applied
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.table = nn.Parameter(torch.randn(len(CLASS), width) * width**-0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def draw(self, step: int) -> Regions:
        return draw_regions(self.model, self.seed, step, self.pictures)

    def logits(self, regions: Regions) -> Tensor:
        states, _ = self.model.model.vision_tower(regions.pixels)
        query = F.normalize(self.head(states), dim=-1)
        scores = query @ F.normalize(self.table, dim=-1).T
        return (scores * self.scale.exp() + self.bias).view(*regions.share_BNC.shape)

    def loss(self, batch: Regions, generator: torch.Generator) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logits(batch), (batch.share_BNC > 0).float()) * len(CLASS)

    @torch.no_grad()
    def gate(self, pictures: int = 64) -> dict[str, float]:
        """Share of words that are named right, by tile tokens of each family and by global tokens, on fresh pictures.

        A word is right when it scores best in its group; words of one group exclude each other.
        """
        figures = {}
        for family in self.pictures:
            regions = draw_regions(self.model, self.seed + 1, 0, {family: pictures})
            logits, tile = self.logits(regions), regions.is_tile_N
            figures[family] = share_right(logits[:, tile], regions.share_BNC[:, tile])
            if family == "glyphs":
                figures["glyphs_global"] = share_right(logits[:, ~tile], regions.share_BNC[:, ~tile])
        return figures


def share_right(logits_BNC: Tensor, share_BNC: Tensor) -> float:
    """Share of tokens and groups whose best word is one that the token shows, where it shows any."""
    right = shown = 0
    sizes = [len(group) for group in GROUPS]
    for logits, share in zip(logits_BNC.split(sizes, -1), share_BNC.split(sizes, -1), strict=True):
        there = share.amax(-1) > 0
        right += int((share.gather(-1, logits.argmax(-1, keepdim=True))[..., 0] > 0)[there].sum())
        shown += int(there.sum())
    return right / max(1, shown)
