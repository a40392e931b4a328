"""Stages "vision" and "align": the tower learns which words a token shows, the projector to give their embeddings.

Both train on patchwork pictures, of which it is known what every vision token shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data.synthetic import text_context
from experiments.data.synthetic.board import Board, generator
from experiments.data.synthetic.board import to_image as board_image
from experiments.data.synthetic.glyphs import GlyphScene, draw_patchwork, labels, to_image
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS, DIGITS, GRID, LETTERS, SHAPES
from experiments.data.synthetic.mixture import FAMILIES
from experiments.data.synthetic.tokenizer import glyph_tokens, word_tokens
from experiments.training.pretrain.text_stage import random_codes
from lavida_adapter import Lavida
from lavida_adapter.lightning_module import OptimConfig, Trainable
from lavida_adapter.views import make_views
from shirg import Role, UserError

GROUPS = (
    DIGITS,
    LETTERS,
    COLOURS[1:],
    SHAPES[1:],
    text_context.ROWS,
    text_context.HEIGHTS,
    (text_context.TENS, text_context.ONES),
)
"""Words that exclude each other in a cell."""
CLASS = {word: i for i, word in enumerate(word for group in GROUPS for word in group)}
"""The class of each word."""
GLYPHS = "glyphs"


@dataclass(frozen=True)
class Regions:
    """Views of B pictures, and what their tokens show. A tile token sees one cell, a global token a square of them."""

    pixels: Tensor
    """float32 [B*V, 3, S, S]."""
    share_BNC: Tensor
    """float32: share of a token's cells that show a class."""
    filled_BN: Tensor
    """float32: share of a token's cells that show any class."""
    is_tile_N: Tensor


def draw_regions(model: Lavida, seed: int, step: int, pictures: Mapping[str, int]) -> Regions:
    """The pictures of a training step, `pictures[family]` of each family; the same in every run."""
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
        raise UserError(f"the canvas has {n_tile_rows} rows of tokens but the picture {rows} rows of cells")
    side = int(cell_N2[role_N == Role.GLOBAL][:, 0].max()) + 1
    coarse = shown_RCC.unflatten(1, (side, -1)).unflatten(0, (side, -1)).mean(dim=(1, 3))
    fine_N = shown_RCC[cell_N2[:, 0], cell_N2[:, 1]]
    coarse_N = coarse[cell_N2[:, 0].clamp_max(side - 1), cell_N2[:, 1].clamp_max(side - 1)]
    return torch.where((role_N == Role.GLOBAL)[:, None], coarse_N, fine_N)


class VisionPretraining(Trainable):
    """Trains the vision tower: each token's state must score the words that the token shows above all others."""

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
        """Share of words that tokens name right on new pictures: tile tokens of each family, and global tokens.

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


class Align(Trainable):
    """Trains the projector: a token becomes the sum of the embeddings, or codes, of the words that it shows."""

    def __init__(
        self, model: Lavida, optim: OptimConfig, seed: int, pictures: Mapping[str, int], codes: str = "words"
    ) -> None:
        super().__init__(model, optim, seed)
        self.pictures = dict(pictures)
        model.requires_grad_(False)
        model.model.mm_projector.requires_grad_(True)
        ids = word_tokens(model.tokenizer)
        table_VD = random_codes(model) if codes == "random" else model.lm.embedding.weight.detach()
        self.class_CD = table_VD[torch.tensor([ids[word] for word in CLASS])].clone()
        self.blank_D = table_VD[glyph_tokens(model.tokenizer).blank].clone()

    def draw(self, step: int) -> Regions:
        return draw_regions(self.model, self.seed, step, self.pictures)

    def loss(self, batch: Regions, generator: torch.Generator) -> Tensor:
        return F.mse_loss(self._projected(batch), self.target(batch.share_BNC, batch.filled_BN))

    def target(self, share_BNC: Tensor, filled_BN: Tensor) -> Tensor:
        """Sums of embeddings or codes [B, N, D]. Empty cells count as blanks; a global token has their mean."""
        return share_BNC @ self.class_CD + (1 - filled_BN)[..., None] * self.blank_D

    def _projected(self, batch: Regions) -> Tensor:
        with torch.no_grad():
            states, _ = self.model.model.vision_tower(batch.pixels)
        projected: Tensor = self.model.model.mm_projector(states)
        return projected.view(*batch.share_BNC.shape[:2], -1)

    @torch.no_grad()
    def gate(self) -> dict[str, float]:
        """Share of the target's variance that the projector explains, on new pictures of each family."""
        figures = {}
        for family in self.pictures:
            regions = draw_regions(self.model, self.seed + 1, 0, {family: 16})
            target = self.target(regions.share_BNC, regions.filled_BN)
            rest = F.mse_loss(self._projected(regions), target)
            figures[family] = 1 - (rest / target.var()).item()
        return figures
