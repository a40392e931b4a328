"""Patchwork pictures and what every vision token of theirs shows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.synthetic.glyphs import draw_patchwork, labels, to_image
from experiments.data.synthetic.glyphs.vocabulary import COLOURS, FIRST_FOIL, SHAPES
from lavida_adapter import Lavida
from lavida_adapter.views import make_views
from shirg import Role

N_CHARS = FIRST_FOIL
N_CLASSES = N_CHARS + len(COLOURS) + len(SHAPES)
"""One class per labelled char, colour and shape, each group with an entry 0 that is never set."""


@dataclass(frozen=True)
class Regions:
    """Views of B pictures and the share of each class in the cells that a token sees."""

    pixels: Tensor
    """float32 [B*V, 3, S, S]."""
    share_BNC: Tensor
    """float32: share of a token's cells that show a class; a tile token sees one cell, a global token a square."""
    is_tile_N: Tensor


def draw_regions(model: Lavida, seed: int, step: int, batch: int) -> Regions:
    """The pictures of a training step, the same in every run."""
    pixels, shares = [], []
    for i in range(batch):
        scene = draw_patchwork(seed, step * batch + i)
        views = make_views(to_image(scene), model.config)
        label = labels(scene)
        cells_RCG = torch.stack([torch.from_numpy(x) for x in (label.char_RC, label.colour_RC, label.shape_RC)], dim=-1)
        pixels.append(views.pixels_V3SS)
        shares.append(class_shares(cells_RCG, views.layout.cell_N2, views.layout.role_N))
    return Regions(torch.cat(pixels), torch.stack(shares), views.layout.role_N == Role.TILE)


def class_shares(cells_RCG: Tensor, cell_N2: Tensor, role_N: Tensor) -> Tensor:
    """Share of each class [N, C] in the cells that each token sees."""
    rows, cols = cells_RCG.shape[:2]
    offset = torch.tensor([0, N_CHARS, N_CHARS + len(COLOURS)])
    onehot_RCC = torch.zeros(rows, cols, N_CLASSES).scatter(-1, cells_RCG + offset, (cells_RCG > 0).float())
    n_tile_rows = int(cell_N2[role_N == Role.TILE][:, 0].max()) + 1
    if n_tile_rows != rows:
        raise ValueError(f"the canvas has {n_tile_rows} rows of tokens but the picture {rows} rows of cells")
    side = int(cell_N2[role_N == Role.GLOBAL][:, 0].max()) + 1
    coarse = onehot_RCC.unflatten(1, (side, -1)).unflatten(0, (side, -1)).mean(dim=(1, 3))
    fine_N = onehot_RCC[cell_N2[:, 0], cell_N2[:, 1]]
    coarse_N = coarse[cell_N2[:, 0].clamp_max(side - 1), cell_N2[:, 1].clamp_max(side - 1)]
    return torch.where((role_N == Role.GLOBAL)[:, None], coarse_N, fine_N)
