"""Glyph scenes: which glyph, colour and big shape each cell shows; with the vocabulary of the task.

Ids of chars, colours and shapes start at 1; 0 means "none" in every table and every label.
"""

import itertools
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from experiments.data.synthetic.synthetic_dataset import BUCKETS, CACHED_ATTEMPTS
from shirg import UserError

DIGITS = tuple("0123456789")
LETTERS = tuple("ACDEFHJKLMNPRTUVWXYZ")
"""Letters that questions ask for."""
FOILS = tuple("BGIOQSabdeghnqrt")
"""Letters that are drawn to crowd the hard pictures; no question asks for them and no label names them."""
CHARS = ("", *DIGITS, *LETTERS, *FOILS)
"""By char id."""

FIRST_DIGIT = 1
FIRST_LETTER = FIRST_DIGIT + len(DIGITS)
FIRST_FOIL = FIRST_LETTER + len(LETTERS)
"""Char ids below this one are the labelled glyphs."""

COLOUR_RGB = {
    "red": (0.92, 0.13, 0.13),
    "green": (0.13, 0.78, 0.20),
    "blue": (0.25, 0.36, 1.00),
    "yellow": (0.96, 0.90, 0.15),
    "cyan": (0.15, 0.85, 0.90),
    "magenta": (0.90, 0.25, 0.85),
    "orange": (1.00, 0.52, 0.08),
    "white": (1.00, 1.00, 1.00),
}
COLOURS = ("", *COLOUR_RGB)
"""By colour id; 0 is gray where there is a glyph and nothing where there is none."""
SHAPES = ("", "square", "circle", "triangle")
"""By shape id."""

TASKS = ("digit", "letter", "shape")
"""First word of a question, as in "digit red" -> "7", "letter K" -> "blue", "shape kind" -> "circle"."""
ASPECTS = ("kind", "colour")
"""Second word of a question about the shape."""
FINE = frozenset({"digit", "letter"})
"""Subtasks whose evidence is one cell (group "fine"); the others, about the big shape, are the group "guard"."""
VERSION = "glyphs-1"
"""Part of every seed; a change of the scenes must change it."""
GRID = 16
SHAPE_SIDE = 4
"""Cells along one side of the big shape."""
DENSITIES: dict[str, tuple[int, int]] = {"sparse": (0, 0), "dense": (100, 100), "hard": (100, 100), "train": (0, 100)}
"""Least and greatest number of distractors; "hard" has them in full colour."""
N_KEYS = dict.fromkeys(DENSITIES, len(LETTERS)) | {"hard": 12}
"""How many letters questions can ask for."""
MAX_ATTEMPTS = 1000

Cells = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BigShape:
    """A shape of 4x4 cells with its top left cell at (row, col)."""

    kind: int
    colour: int
    row: int
    col: int


@dataclass(frozen=True, eq=False)
class GlyphScene:
    """Char id and colour id of every cell, and the big shapes (one, but for the patchworks of `draw_patchwork`)."""

    char_RC: Cells
    colour_RC: Cells
    """Colour of the glyph in the cell; 0 with a char is gray."""
    shapes: tuple[BigShape, ...]
    look: int
    """Seed of what carries no meaning: jitter, noise, the order of the questions."""

    @cached_property
    def digest(self) -> int:
        """Hash of the content; scenes that differ only in `look` have the same."""
        shapes = ";".join(f"{s.kind},{s.colour},{s.row},{s.col}" for s in self.shapes)
        payload = self.char_RC.tobytes() + self.colour_RC.tobytes() + shapes.encode()
        return int.from_bytes(blake2b(payload, digest_size=8).digest())


def draw_scene(seed: int, split: str, index: int, density: str, letters: str = "", least: int = 0) -> GlyphScene:
    """Scene number `index` of a split; the same in every process, whatever was drawn before.

    Draws again until the scene's hash falls into the split's bucket, so no scene is ever in two splits, and until
    questions can ask for `least` of the `letters`.
    """
    if split not in BUCKETS:
        raise UserError(f"split={split!r} does not exist: choose one of {', '.join(BUCKETS)}")
    if density not in DENSITIES:
        raise UserError(f"density={density!r} does not exist: choose one of {', '.join(DENSITIES)}")
    return _attempt(seed, split, index, density, _accepted(seed, split, index, density, letters, least))


@lru_cache(maxsize=CACHED_ATTEMPTS)
def _accepted(seed: int, split: str, index: int, density: str, letters: str, least: int) -> int:
    """The number of the first draw that falls into the split and has the letters."""
    for number in range(MAX_ATTEMPTS):
        scene = _attempt(seed, split, index, density, number)
        if scene.digest % 100 in BUCKETS[split] and len(set(letters).intersection(keys(scene))) >= least:
            return number
    wanted = f" has {least} of the letters {letters}: lower data.qa_per_image" if least else ""
    raise UserError(f"no scene of split {split!r} in {MAX_ATTEMPTS} draws (seed {seed}, index {index}){wanted}")


def _attempt(seed: int, split: str, index: int, density: str, number: int) -> GlyphScene:
    return _compose(_generator(seed, split, density, index, number), density)


def keys(scene: GlyphScene) -> list[str]:
    """The letters that a question can ask for, in the order of their ids: each is in the scene once, in colour."""
    letter_RC = (scene.char_RC >= FIRST_LETTER) & (scene.char_RC < FIRST_FOIL) & (scene.colour_RC > 0)
    found, counts = np.unique(scene.char_RC[letter_RC], return_counts=True)
    return [CHARS[char] for char in found[counts == 1]]


def draw_patchwork(seed: int, index: int, *, foil_share: float = 0.1) -> GlyphScene:
    """A scene for training the vision tower on single cells: random glyphs, most in colour, and 1 to 3 shapes.

    `foil_share` of the glyphs have no name, so that the tower learns that a mark need not be a known character.
    """
    rng = np.random.default_rng(_seed("patchwork", seed, index))
    filled = rng.random((GRID, GRID)) < rng.uniform(0.3, 0.95)
    foil = rng.random((GRID, GRID)) < foil_share
    named = rng.integers(FIRST_DIGIT, FIRST_FOIL, (GRID, GRID))
    char = np.where(foil, rng.integers(FIRST_FOIL, len(CHARS), (GRID, GRID)), named)
    colour = np.where(rng.random((GRID, GRID)) < 0.15, 0, rng.integers(1, len(COLOURS), (GRID, GRID)))
    shapes: list[BigShape] = []
    blocks: set[tuple[int, int]] = set()
    layout = random.Random(int(rng.integers(2**63)))
    for _ in range(layout.randint(1, 3)):
        shapes.append(_shape(layout, blocks))
    for row, col in blocks:
        filled[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = False
    return _freeze(np.where(filled, char, 0), np.where(filled, colour, 0), shapes, layout)


def _compose(rng: random.Random, density: str) -> GlyphScene:
    hard = density == "hard"
    char, colour = [0] * (GRID * GRID), [0] * (GRID * GRID)
    blocks: set[tuple[int, int]] = set()
    shape = _shape(rng, blocks)
    # Answers are drawn before places, so that digits, letter colours and shapes are uniform for every layout.
    hues = range(1, len(COLOURS))
    digits = list(zip(rng.choices(range(FIRST_DIGIT, FIRST_LETTER), k=len(hues)), hues, strict=True))
    rng.shuffle(digits)
    asked = rng.sample(range(FIRST_LETTER, FIRST_FOIL), N_KEYS[density])
    letters = list(zip(asked, rng.choices(hues, k=len(asked)), strict=True))
    cells = [cell for _ in range(len(digits) // 4) for cell in _cluster(rng, blocks, 2, 2)]
    while len(cells) < len(digits) + len(letters):
        left = len(digits) + len(letters) - len(cells)
        height, width = rng.choice([(2, 2), (1, 4), (2, 4)] if left >= 8 else [(2, 2), (1, 4)])
        cells += _cluster(rng, blocks, height, width)
    for cell, (c, h) in zip(cells, digits + letters, strict=True):
        char[cell], colour[cell] = c, h
    taken = {*cells, *_shape_cells(shape)}
    free = [cell for cell in range(GRID * GRID) if cell not in taken]
    count = rng.randint(*DENSITIES[density])
    if hard:
        # In turn, not at random: a letter that appeared only once would look like a key.
        types = [c for c in range(FIRST_LETTER, len(CHARS)) if c not in asked]
        rng.shuffle(types)
        crowd = list(zip(itertools.cycle(types), rng.choices(hues, k=count), strict=False))
    else:
        crowd = [(c, 0) for c in rng.choices(range(FIRST_DIGIT, FIRST_FOIL), k=count)]
    for cell, (c, h) in zip(rng.sample(free, count), crowd, strict=True):
        char[cell], colour[cell] = c, h
    return _freeze(char, colour, [shape], rng)


def _cluster(rng: random.Random, blocks: set[tuple[int, int]], height: int, width: int) -> list[int]:
    """Cells of a free cluster that begins on a pooling block; a single row takes the block's upper or lower half."""
    row, col = _place(rng, blocks, 1, width // 2)
    top = 2 * row + (rng.randrange(2) if height == 1 else 0)
    return [(top + r) * GRID + 2 * col + c for r in range(height) for c in range(width)]


def _shape(rng: random.Random, blocks: set[tuple[int, int]]) -> BigShape:
    kind, colour = rng.randrange(1, len(SHAPES)), rng.randrange(1, len(COLOURS))
    row, col = _place(rng, blocks, SHAPE_SIDE // 2, SHAPE_SIDE // 2)
    return BigShape(kind, colour, 2 * row, 2 * col)


def _place(rng: random.Random, blocks: set[tuple[int, int]], height: int, width: int) -> tuple[int, int]:
    """Adds a free rectangle of 2x2-cell blocks to `blocks`, and returns its top left block."""
    side = GRID // 2
    while True:
        row, col = rng.randrange(side - height + 1), rng.randrange(side - width + 1)
        wanted = set(itertools.product(range(row, row + height), range(col, col + width)))
        if blocks.isdisjoint(wanted):
            blocks |= wanted
            return row, col


def _shape_cells(shape: BigShape) -> list[int]:
    return [(shape.row + r) * GRID + shape.col + c for r in range(SHAPE_SIDE) for c in range(SHAPE_SIDE)]


def _freeze(char: npt.ArrayLike, colour: npt.ArrayLike, shapes: list[BigShape], rng: random.Random) -> GlyphScene:
    char_RC, colour_RC = (np.array(values, dtype=np.uint8).reshape(GRID, GRID) for values in (char, colour))
    char_RC.setflags(write=False)
    colour_RC.setflags(write=False)
    return GlyphScene(char_RC, colour_RC, tuple(shapes), look=rng.getrandbits(63))


def _seed(*parts: object) -> int:
    return int.from_bytes(blake2b("|".join(map(str, (VERSION, *parts))).encode(), digest_size=16).digest())


def _generator(*parts: object) -> random.Random:
    return random.Random(_seed(*parts))
