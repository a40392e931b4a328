"""Drawings of the entities as masks, which scale to any canvas."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from experiments.data.synthetic.entitygrid.entities import Entity
from experiments.data.synthetic.glyphs.render import GLYPH_H, GLYPH_W, GLYPHS
from experiments.data.synthetic.glyphs.scene import CHARS

FINER = 4
"""Drawings are made larger by this factor and then averaged down."""
WIDEST_STRING = 1.6
"""Width of a string at most, in sizes."""

Point = tuple[float, float]
_Pen = Callable[["_Board"], None]


class _Board:
    """A square of side 1 to draw on, origin at the top left."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.mask = Image.new("L", (side, side), 0)
        self.draw = ImageDraw.Draw(self.mask)

    def polygon(self, *points: Point, ink: int = 255) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=ink)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, ink: int = 255) -> None:
        self.draw.ellipse(self._box(x0, y0, x1, y1), fill=ink)

    def box(self, x0: float, y0: float, x1: float, y1: float, ink: int = 255) -> None:
        self.draw.rectangle(self._box(x0, y0, x1, y1), fill=ink)

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        side = self.side
        return (x0 * side, y0 * side, x1 * side - 1, y1 * side - 1)

    def line(self, *points: Point, width: float) -> None:
        self.draw.line([(x * self.side, y * self.side) for x, y in points], fill=255, width=round(width * self.side))


@lru_cache(maxsize=512)
def mask_of(entity: Entity, size: int) -> Image.Image:
    """The entity's ink (L, 255 is full) in a box of about `size` pixels: size x size, or a string's own shape."""
    if entity.family == "string":
        return _string(entity.kind, size)
    if entity.family == "character":
        return _glyphs(entity.kind).resize((round(size * GLYPH_W / GLYPH_H), size), Image.Resampling.NEAREST)
    board = _Board(size * FINER)
    _DRAWINGS[entity.kind](board)
    return board.mask.reduce(FINER)


def _string(text: str, size: int) -> Image.Image:
    """Half as high as the size if it fits, scaled by a whole number: uneven strokes are hard to read."""
    strip = _glyphs(text)
    scale = max(1, int(min(size / 2 / GLYPH_H, WIDEST_STRING * size / strip.width)))
    return strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)


def _glyphs(text: str) -> Image.Image:
    gap = np.zeros((GLYPH_H, 1), dtype=bool)
    columns = [part for char in text for part in (GLYPHS[CHARS.index(char)], gap)][:-1]
    return Image.fromarray(np.concatenate(columns, axis=1).astype(np.uint8) * 255)


def _round(n: int, turn: float = 0.0, inner: float = 1.0) -> Sequence[Point]:
    """n points on a circle, the first on top; with `inner` every second one lies on a smaller circle."""
    angles = [(i + turn) * 2 * math.pi / n for i in range(n)]
    radii = [0.5 * (inner if i % 2 else 1.0) for i in range(n)]
    return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _cross(b: _Board) -> None:
    b.box(0.35, 0, 0.65, 1)
    b.box(0, 0.35, 1, 0.65)


def _heart(b: _Board) -> None:
    b.ellipse(0, 0.05, 0.54, 0.6)
    b.ellipse(0.46, 0.05, 1, 0.6)
    b.polygon((0.04, 0.44), (0.96, 0.44), (0.5, 1))


def _crescent(b: _Board) -> None:
    b.ellipse(0, 0, 1, 1)
    b.ellipse(0.3, -0.05, 1.2, 0.85, ink=0)


def _ring(b: _Board) -> None:
    b.ellipse(0, 0, 1, 1)
    b.ellipse(0.25, 0.25, 0.75, 0.75, ink=0)


def _house(b: _Board) -> None:
    b.polygon((0, 0.45), (0.5, 0), (1, 0.45))
    b.box(0.12, 0.45, 0.88, 1)
    b.box(0.42, 0.65, 0.6, 1, ink=0)


def _tree(b: _Board) -> None:
    b.polygon((0.5, 0), (0.85, 0.45), (0.15, 0.45))
    b.polygon((0.5, 0.2), (1, 0.75), (0, 0.75))
    b.box(0.42, 0.75, 0.58, 1)


def _key(b: _Board) -> None:
    b.ellipse(0, 0.28, 0.44, 0.72)
    b.ellipse(0.13, 0.41, 0.31, 0.59, ink=0)
    b.box(0.4, 0.44, 1, 0.56)
    b.box(0.88, 0.5, 1, 0.76)
    b.box(0.68, 0.5, 0.78, 0.7)


def _cup(b: _Board) -> None:
    b.ellipse(0.55, 0.3, 1, 0.72)
    b.ellipse(0.66, 0.4, 0.9, 0.62, ink=0)
    b.polygon((0.05, 0.2), (0.75, 0.2), (0.66, 0.85), (0.14, 0.85))
    b.box(0, 0.88, 0.8, 0.97)


def _fish(b: _Board) -> None:
    b.ellipse(0, 0.22, 0.76, 0.78)
    b.polygon((0.62, 0.5), (1, 0.18), (1, 0.82))
    b.ellipse(0.14, 0.38, 0.24, 0.48, ink=0)


def _boat(b: _Board) -> None:
    b.polygon((0, 0.72), (1, 0.72), (0.82, 1), (0.18, 1))
    b.box(0.47, 0, 0.53, 0.72)
    b.polygon((0.57, 0.05), (0.57, 0.64), (0.95, 0.64))
    b.polygon((0.43, 0.2), (0.43, 0.64), (0.12, 0.64))


def _flag(b: _Board) -> None:
    b.box(0.08, 0, 0.18, 1)
    b.polygon((0.18, 0.04), (1, 0.2), (0.18, 0.56))


def _sun(b: _Board) -> None:
    b.ellipse(0.26, 0.26, 0.74, 0.74)
    for x, y in _round(8):
        b.line((0.5 + (x - 0.5) * 0.62, 0.5 + (y - 0.5) * 0.62), (x, y), width=0.07)


def _umbrella(b: _Board) -> None:
    b.ellipse(0, 0.02, 1, 0.98)
    b.box(0, 0.5, 1, 1, ink=0)
    b.box(0.46, 0.45, 0.54, 0.92)
    b.box(0.3, 0.86, 0.54, 0.94)


def _ladder(b: _Board) -> None:
    b.box(0.15, 0, 0.27, 1)
    b.box(0.73, 0, 0.85, 1)
    for step in range(5):
        b.box(0.2, 0.08 + 0.2 * step, 0.8, 0.15 + 0.2 * step)


def _mushroom(b: _Board) -> None:
    b.ellipse(0, 0.02, 1, 1.02)
    b.box(0, 0.52, 1, 1, ink=0)
    b.polygon((0.36, 0.5), (0.64, 0.5), (0.72, 1), (0.28, 1))
    b.ellipse(0.28, 0.2, 0.42, 0.34, ink=0)
    b.ellipse(0.58, 0.24, 0.74, 0.4, ink=0)


def _bell(b: _Board) -> None:
    b.ellipse(0.42, 0, 0.58, 0.16)
    b.ellipse(0.2, 0.08, 0.8, 0.78)
    b.polygon((0.2, 0.43), (0.8, 0.43), (0.95, 0.82), (0.05, 0.82))
    b.ellipse(0.4, 0.8, 0.6, 1)


_DRAWINGS: dict[str, _Pen] = {
    "circle": lambda b: b.ellipse(0, 0, 1, 1),
    "square": lambda b: b.box(0.04, 0.04, 0.96, 0.96),
    "triangle": lambda b: b.polygon((0.5, 0), (1, 0.95), (0, 0.95)),
    "diamond": lambda b: b.polygon((0.5, 0), (0.85, 0.5), (0.5, 1), (0.15, 0.5)),
    "pentagon": lambda b: b.polygon(*_round(5)),
    "hexagon": lambda b: b.polygon(*_round(6, turn=0.5)),
    "star": lambda b: b.polygon(*_round(10, inner=0.42)),
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": lambda b: b.polygon((0, 0.35), (0.5, 0.35), (0.5, 0.08), (1, 0.5), (0.5, 0.92), (0.5, 0.65), (0, 0.65)),
    "ring": _ring,
    "house": _house,
    "tree": _tree,
    "key": _key,
    "cup": _cup,
    "fish": _fish,
    "boat": _boat,
    "flag": _flag,
    "sun": _sun,
    "umbrella": _umbrella,
    "ladder": _ladder,
    "mushroom": _mushroom,
    "bell": _bell,
}
