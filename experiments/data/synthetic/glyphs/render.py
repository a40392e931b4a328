"""Glyph scenes as pictures, and the labels of their cells; with the 5x7 font, one bitmap for each char."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from experiments.data.synthetic.glyphs.scene import CHARS, COLOUR_RGB, FIRST_FOIL, GRID, SHAPE_SIDE, SHAPES, GlyphScene

GLYPH_H, GLYPH_W = 7, 5
CELL_PX = 8
PICTURE_PX = GRID * CELL_PX
NOISE_STD = 0.05
BACKGROUND = 0.1
GRAY = 0.5
DIM = 0.45
"""Brightness of the big shape relative to a glyph of the same colour."""
LABELLED_COVER = 0.1
"""Least share of a cell that the shape must cover for the cell to be labelled with it."""

Picture = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

_SHEETS = {
    "0123456789": """
.###. ..#.. .###. ####. ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ....# ..##. #.... .#... ....# #...# #...#
#..## #.#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. .###. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... ....# ...#. #...# #...# .#... #...# ...#.
.###. ##### ##### ####. ...#. .###. .###. .#... .###. .##..
""",
    "ACDEFHJKLM": """
..#.. .###. ###.. ##### ##### #...# ..### #...# #.... #...#
.#.#. #...# #..#. #.... #.... #...# ...#. #..#. #.... ##.##
#...# #.... #...# #.... #.... #...# ...#. #.#.. #.... #.#.#
#...# #.... #...# ####. ###.. ##### ...#. ##... #.... #.#.#
##### #.... #...# #.... #.... #...# ...#. #.#.. #.... #...#
#...# #...# #..#. #.... #.... #...# #..#. #..#. #.... #...#
#...# .###. ###.. ##### #.... #...# .##.. #...# ##### #...#
""",
    "NPRTUVWXYZ": """
#...# ####. ####. ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# ..#.. #...# #...# #...# #...# #...# #...#
##..# #...# #...# ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# ####. ####. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#..## #.... #.#.. ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#...
#..## #.... #..#. ..#.. #...# .#.#. ##.## #...# ..#.. #...#
#...# #.... #...# ..#.. .###. ..#.. #...# #...# ..#.. #####
""",
    "BGIOQSab": """
####. .###. .###. .###. .###. .#### ..... #....
#...# #...# ..#.. #...# #...# #.... ..... #....
#...# #.... ..#.. #...# #...# #.... .###. #.##.
####. #.### ..#.. #...# #...# .###. ....# ##..#
#...# #...# ..#.. #...# #.#.# ....# .#### #...#
#...# #...# ..#.. #...# #..#. ....# #...# #...#
####. .#### .###. .###. .##.# ####. .#### ####.
""",
    "deghnqrt": """
....# ..... ..... #.... ..... ..... ..... .#...
....# ..... .#### #.... ..... .##.# ..... .#...
.##.# .###. #...# #.##. #.##. #..## #.##. ###..
#..## #...# #...# ##..# ##..# #...# ##..# .#...
#...# ##### .#### #...# #...# .#### #.... .#...
#...# #.... ....# #...# #...# ....# #.... .#..#
.#### .###. .###. #...# #...# ....# #.... ..##.
""",
}


@dataclass(frozen=True)
class Labels:
    """What each cell [16, 16] shows: char, colour and shape id, 0 for none. Foils have a colour and no char."""

    char_RC: Ids
    colour_RC: Ids
    shape_RC: Ids


def render(scene: GlyphScene) -> Picture:
    """The picture [128, 128, 3] in uint8; everything random in it comes from `scene.look`."""
    rng = np.random.default_rng(scene.look)
    jitter_RC = rng.integers(len(JITTERED), size=(GRID, GRID))
    ink_RCyx = JITTERED[jitter_RC, scene.char_RC]
    rgb_RC3 = _GLYPH_RGB[scene.colour_RC]
    for shape in scene.shapes:
        box = np.s_[shape.row : shape.row + SHAPE_SIDE, shape.col : shape.col + SHAPE_SIDE]
        ink_RCyx[box] = SHAPE_INK[shape.kind]
        rgb_RC3[box] = _GLYPH_RGB[shape.colour] * DIM
    clean = BACKGROUND + ink_RCyx[..., None] * (rgb_RC3[:, :, None, None] - np.float32(BACKGROUND))
    picture = clean.transpose(0, 2, 1, 3, 4).reshape(PICTURE_PX, PICTURE_PX, 3)
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    noise *= NOISE_STD
    noise += picture
    noise *= 255
    noise += 0.5
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


def to_image(scene: GlyphScene) -> Image.Image:
    return Image.fromarray(render(scene))


def labels(scene: GlyphScene) -> Labels:
    """The labels of the cells, for training the vision tower."""
    char, colour = scene.char_RC.astype(np.int64), scene.colour_RC.astype(np.int64)
    kind = np.zeros_like(char)
    for shape in scene.shapes:
        box = np.s_[shape.row : shape.row + SHAPE_SIDE, shape.col : shape.col + SHAPE_SIDE]
        covered = SHAPE_INK[shape.kind].mean(axis=(2, 3)) >= LABELLED_COVER
        kind[box] = np.where(covered, shape.kind, 0)
        colour[box] = np.where(covered, shape.colour, 0)
    return Labels(np.where(char < FIRST_FOIL, char, 0), colour, kind)


def _read_font(sheets: dict[str, str]) -> npt.NDArray[np.bool_]:
    """Bitmaps [len(CHARS), 7, 5] by char id; id 0 is empty."""
    glyphs = np.zeros((len(CHARS), GLYPH_H, GLYPH_W), dtype=np.bool_)
    for names, sheet in sheets.items():
        rows = [line.split() for line in sheet.split("\n") if line]
        for column, name in enumerate(names):
            glyphs[CHARS.index(name)] = [[pixel == "#" for pixel in row[column]] for row in rows]
    return glyphs


def _jittered() -> npt.NDArray[np.float32]:
    """Every glyph [8, chars, 8, 8] at every place it can take in its cell."""
    places = [(y, x) for y in range(CELL_PX - GLYPH_H + 1) for x in range(CELL_PX - GLYPH_W + 1)]
    cells = np.zeros((len(places), len(GLYPHS), CELL_PX, CELL_PX), dtype=np.float32)
    for place, (y, x) in enumerate(places):
        cells[place, :, y : y + GLYPH_H, x : x + GLYPH_W] = GLYPHS
    return cells


def _shape_ink() -> npt.NDArray[np.float32]:
    """The shapes [kinds, 4, 4, 8, 8] cut into cells, by shape id."""
    side = SHAPE_SIDE * CELL_PX
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    reach = side / 2 - 1
    inside = {
        "": np.zeros((side, side)),
        "square": np.maximum(abs(x), abs(y)) < reach - 1,
        "circle": np.hypot(x, y) < reach,
        "triangle": (abs(x) < (y + reach) / 2) & (y < reach),
    }
    whole = np.stack([inside[name] for name in SHAPES]).astype(np.float32)
    return whole.reshape(len(SHAPES), SHAPE_SIDE, CELL_PX, SHAPE_SIDE, CELL_PX).transpose(0, 1, 3, 2, 4)


GLYPHS = _read_font(_SHEETS)
GLYPHS.setflags(write=False)
JITTERED = _jittered()
SHAPE_INK = _shape_ink()
_GLYPH_RGB = np.array([(GRAY,) * 3, *COLOUR_RGB.values()], dtype=np.float32)
