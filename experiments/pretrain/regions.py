"""Patchwork pictures and what every vision token of theirs shows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.synthetic import words
from experiments.data.synthetic.board import Board, generator
from experiments.data.synthetic.board import to_image as board_image
from experiments.data.synthetic.families import FAMILIES
from experiments.data.synthetic.glyphs import GlyphScene, draw_patchwork, labels, to_image
from experiments.data.synthetic.glyphs.scene import GRID
from experiments.data.synthetic.glyphs.vocabulary import CHARS, COLOURS, DIGITS, LETTERS, SHAPES
from lavida_adapter import Lavida
from lavida_adapter.views import make_views
from shirg import Role

GROUPS = (
    DIGITS,
    LETTERS,
    COLOURS[1:],
    SHAPES[1:],
    words.ROWS,
    words.HEIGHTS,
    (words.TENS, words.ONES),
)
"""Words that exclude each other in a cell."""
CLASS = {word: i for i, word in enumerate(word for group in GROUPS for word in group)}
"""The class of each word."""
GLYPHS = "glyphs"


@dataclass(frozen=True)
class Regions:
    """Views of B pictures and the share of each class in the cells that a token sees."""

    pixels: Tensor
    """float32 [B*V, 3, S, S]."""
    share_BNC: Tensor
    """float32: share of a token's cells that show a class; a tile token sees one cell, a global token a square."""
    filled_BN: Tensor
    """float32: share of a token's cells that show any class."""
    is_tile_N: Tensor


def draw_regions(model: Lavida, seed: int, step: int, pictures: Mapping[str, int]) -> Regions:
    """The pictures of a training step, so many of each family; the same in every run."""
    pixels, shares = [], []
    for family, number in pictures.items():
        for index in range(step * number, (step + 1) * number):
            if family == GLYPHS:
                scene = draw_patchwork(seed, index)
                image, shown_RCC = to_image(scene), _glyph_classes(scene)
            else:
                board = FAMILIES[family].patchwork(generator(family, "patchwork", seed, index))
                image, shown_RCC = board_image(board), board_classes(board)
            views = make_views(image, model.config)
            pixels.append(views.pixels_V3SS)
            shown_RCC = torch.cat([shown_RCC, shown_RCC.amax(-1, keepdim=True)], dim=-1)
            shares.append(class_shares(shown_RCC, views.layout.cell_N2, views.layout.role_N))
    share_BNC = torch.stack(shares)
    return Regions(torch.cat(pixels), share_BNC[..., :-1], share_BNC[..., -1], views.layout.role_N == Role.TILE)


def board_classes(board: Board) -> Tensor:
    """Which classes [R, C, classes] each cell shows, 1 or 0."""
    shown_RCC = torch.zeros(GRID, GRID, len(CLASS))
    for stamp in board.stamps:
        for row, col in stamp.cells:
            shown_RCC[row, col, [CLASS[word] for word in stamp.words]] = 1
    return shown_RCC


def _glyph_classes(scene: GlyphScene) -> Tensor:
    shown_RCC = torch.zeros(GRID, GRID, len(CLASS))
    label = labels(scene)
    for id_RC, names in ((label.char_RC, CHARS), (label.colour_RC, COLOURS), (label.shape_RC, SHAPES)):
        rows, cols = id_RC.nonzero()
        shown_RCC[rows, cols, [CLASS[names[i]] for i in id_RC[rows, cols]]] = 1
    return shown_RCC


def class_shares(shown_RCC: Tensor, cell_N2: Tensor, role_N: Tensor) -> Tensor:
    """Share of each class [N, C] in the cells that each token sees."""
    rows = shown_RCC.shape[0]
    n_tile_rows = int(cell_N2[role_N == Role.TILE][:, 0].max()) + 1
    if n_tile_rows != rows:
        raise ValueError(f"the canvas has {n_tile_rows} rows of tokens but the picture {rows} rows of cells")
    side = int(cell_N2[role_N == Role.GLOBAL][:, 0].max()) + 1
    coarse = shown_RCC.unflatten(1, (side, -1)).unflatten(0, (side, -1)).mean(dim=(1, 3))
    fine_N = shown_RCC[cell_N2[:, 0], cell_N2[:, 1]]
    coarse_N = coarse[cell_N2[:, 0].clamp_max(side - 1), cell_N2[:, 1].clamp_max(side - 1)]
    return torch.where((role_N == Role.GLOBAL)[:, None], coarse_N, fine_N)
