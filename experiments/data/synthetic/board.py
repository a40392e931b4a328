"""Pictures of the four task families: stamps on the 16x16 cells of the tiny testbed, and how they are rendered.

A stamp is one thing that is drawn: its mark, its place, and the words that name it. The tower and the language model
are trained on those words; a picture shows nothing besides its stamps.
Shape letters: R rows, C columns of cells, y and x pixels of one cell.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from experiments.data.synthetic.glyphs.render import (
    BACKGROUND,
    CELL_PX,
    DIM,
    GRAY,
    JITTERED,
    LABELLED_COVER,
    NOISE_STD,
    PICTURE_PX,
    SHAPE_INK,
)
from experiments.data.synthetic.glyphs.scene import CHARS, COLOUR_RGB, GRID, SHAPE_SIDE, SHAPES

PANEL = GRID // 2
"""Cells along one side of a quarter of the picture, which is one tile of the tiny model."""
PAPER, INK = 0.92, 0.15
"""A page is dark on light, unlike a picture of glyphs."""
AXIS = 0.25
PARTS = 4
"""Heights that a bar can have in its cell."""
BAR = "bar"
KINDS = ("disc", "ring", "cross", "plus")
"""Small marks that fill a cell."""

Cell = tuple[int, int]


@dataclass(frozen=True)
class Stamp:
    """A char, bar or small mark in the cell (row, col), or a big shape whose top left cell that is."""

    row: int
    col: int
    mark: str
    colour: str = ""
    """Empty is grey, on paper dark."""
    part: int = 0
    """Of a bar: its height in the cell, from 0 at the bottom to 3."""
    words: tuple[str, ...] = ()

    @property
    def side(self) -> int:
        """Cells along one side."""
        return SHAPE_SIDE if self.mark in SHAPES else 1

    @property
    def cells(self) -> list[Cell]:
        """The cells that it is drawn in; the blank corners of a big shape are not among them."""
        if self.side == 1:
            return [(self.row, self.col)]
        covered = SHAPE_INK[SHAPES.index(self.mark)].mean(axis=(2, 3)) >= LABELLED_COVER
        return [(self.row + int(r), self.col + int(c)) for r, c in np.argwhere(covered)]


@dataclass(frozen=True)
class Board:
    """All that a picture shows."""

    stamps: tuple[Stamp, ...]
    look: int
    """Seed of everything without meaning: jitter, noise, the order of the questions."""
    paper: bool = False
    axes: bool = False
    """A line along the left and the lower side of each quarter."""

    @cached_property
    def digest(self) -> int:
        """Hash of the content; boards that differ only in `look` have the same."""
        content = sorted((s.row, s.col, s.mark, s.colour, s.part) for s in self.stamps)
        return int.from_bytes(blake2b(repr((self.paper, content)).encode(), digest_size=8).digest())


def generator(*parts: object) -> Random:
    """A random generator for one picture: the order of drawing and the number of workers do not matter."""
    return Random(int.from_bytes(blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest()))


def blocks_of(rng: Random, n: int, taken: set[Cell] | None = None) -> list[list[Cell]]:
    """The four cells of each of `n` different pooling blocks, at random places clear of `taken`."""
    corners = [(r, c) for r in range(0, GRID, 2) for c in range(0, GRID, 2)]
    free = [(r, c) for r, c in corners if not taken or (r, c) not in taken]
    return [[(r + y, c + x) for y in (0, 1) for x in (0, 1)] for r, c in rng.sample(free, n)]


def free_cells(taken: set[Cell]) -> list[Cell]:
    return [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in taken]


def box_of(stamp: Stamp) -> tuple[float, float, float, float]:
    """Where the stamp is, as fractions of the picture."""
    x, y, side = stamp.col, stamp.row, stamp.side
    return (x / GRID, y / GRID, (x + side) / GRID, (y + side) / GRID)


def render(board: Board) -> npt.NDArray[np.uint8]:
    """The picture [128, 128, 3]; everything random in it comes from `board.look`."""
    rng = np.random.default_rng(board.look)
    ground = PAPER if board.paper else BACKGROUND
    picture = np.full((PICTURE_PX, PICTURE_PX, 3), ground, dtype=np.float32)
    if board.axes:
        picture[:, :: PANEL * CELL_PX] = AXIS
        picture[PANEL * CELL_PX - 1 :: PANEL * CELL_PX] = AXIS
    plain = np.float32(INK if board.paper else GRAY)
    for stamp, jitter in zip(board.stamps, rng.integers(len(JITTERED), size=len(board.stamps)).tolist(), strict=True):
        rgb = np.array(COLOUR_RGB[stamp.colour], dtype=np.float32) if stamp.colour else np.full(3, plain)
        ink_yx = _ink(stamp, jitter)
        y, x, side = stamp.row * CELL_PX, stamp.col * CELL_PX, stamp.side * CELL_PX
        picture[y : y + side, x : x + side][ink_yx > 0] = rgb * (DIM if stamp.mark in SHAPES else 1)
    picture += NOISE_STD * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def to_image(board: Board) -> Image.Image:
    return Image.fromarray(render(board))


def _ink(stamp: Stamp, jitter: int) -> npt.NDArray[np.float32]:
    """Which pixels the stamp inks: [8, 8], of a big shape [32, 32]."""
    if stamp.mark in SHAPES:
        side = SHAPE_SIDE * CELL_PX
        return SHAPE_INK[SHAPES.index(stamp.mark)].transpose(0, 2, 1, 3).reshape(side, side)
    if stamp.mark == BAR:
        return _BARS[stamp.part, jitter % len(_BARS[0])]
    if stamp.mark in KINDS:
        return _MARKS[KINDS.index(stamp.mark), jitter % len(_MARKS[0])]
    return JITTERED[jitter, CHARS.index(stamp.mark)]


def _bars() -> npt.NDArray[np.float32]:
    """Bars [4 heights, 3 places, 8, 8] of 5x2 px; a bar moves sideways only, because its height is its meaning."""
    bars = np.zeros((PARTS, 3, CELL_PX, CELL_PX), dtype=np.float32)
    for part in range(PARTS):
        for place in range(3):
            top = CELL_PX - 2 * (part + 1)
            bars[part, place, top : top + 2, 1 + place : 6 + place] = 1
    return bars


def _marks() -> npt.NDArray[np.float32]:
    """The small marks [kinds, 4 places, 8, 8], 7 px wide, by the order of KINDS."""
    y, x = np.mgrid[:7, :7] - 3
    far = np.hypot(y, x)
    inside = [far < 3.3, (far < 3.7) & (far > 2.2), abs(abs(y) - abs(x)) < 1, (abs(y) < 1) | (abs(x) < 1)]
    marks = np.zeros((len(KINDS), 4, CELL_PX, CELL_PX), dtype=np.float32)
    for place in range(4):
        top, left = divmod(place, 2)
        marks[:, place, top : top + 7, left : left + 7] = inside
    return marks


_BARS = _bars()
_MARKS = _marks()
