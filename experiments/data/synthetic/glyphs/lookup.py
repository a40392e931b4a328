"""Text twins of the glyph pictures, for teaching the language model to look things up before it sees any picture.

A context is N cells; each is a bag of at most one char and one colour, as the projector's output will be.
Shape letters: B batch, N cells, G questions about one context.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.data.synthetic.glyphs.vocabulary import (
    COLOURS,
    DIGITS,
    FIRST_DIGIT,
    FIRST_FOIL,
    FIRST_LETTER,
    LETTERS,
    TASKS,
)

DIGIT, LETTER = TASKS.index("digit"), TASKS.index("letter")
"""Values of `Lookups.task_BG`."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lookups:
    """B contexts of N cells with G questions each; char and colour ids are those of the vocabulary."""

    char_BN: Ids
    """0 for a blank."""
    colour_BN: Ids
    """0 for a blank or a gray glyph."""
    task_BG: Ids
    argument_BG: Ids
    """Colour id where the task is DIGIT, char id where it is LETTER."""
    answer_BG: Ids
    """Char id where the task is DIGIT, colour id where it is LETTER."""


def draw_lookups(
    rng: np.random.Generator,
    *,
    batch: int,
    cells: int,
    questions: int = 1,
    tasks: Literal["both", "digit", "letter"] = "both",
) -> Lookups:
    """Contexts with digits of different colours, different letters, gray glyphs and blanks, at random places.

    Up to 16 cells it is half digits, half letters; then letters up to all 20; then gray glyphs and blanks in any ratio.
    """
    if cells < 2 or batch < 1 or questions < 1:
        raise ValueError(f"cells={cells}, batch={batch}, questions={questions}: need at least 2, 1 and 1")
    n_digits = min(len(COLOURS) - 1, cells // 2)
    n_letters = min(len(LETTERS), cells - n_digits)
    n_content, n_rest = n_digits + n_letters, cells - n_digits - n_letters

    char = np.zeros((batch, cells), dtype=np.int64)
    colour = np.zeros_like(char)
    char[:, :n_digits] = rng.integers(FIRST_DIGIT, FIRST_DIGIT + len(DIGITS), (batch, n_digits))
    colour[:, :n_digits] = 1 + _distinct(rng, batch, len(COLOURS) - 1, n_digits)
    char[:, n_digits:n_content] = FIRST_LETTER + _distinct(rng, batch, len(LETTERS), n_letters)
    colour[:, n_digits:n_content] = rng.integers(1, len(COLOURS), (batch, n_letters))
    is_gray = np.arange(n_rest) < rng.integers(0, n_rest + 1, (batch, 1))
    char[:, n_content:] = np.where(is_gray, rng.integers(FIRST_DIGIT, FIRST_FOIL, (batch, n_rest)), 0)

    shape = (batch, questions)
    task = rng.integers(DIGIT, LETTER + 1, shape) if tasks == "both" else np.full(shape, TASKS.index(tasks))
    about_digit, about_letter = rng.integers(0, n_digits, shape), rng.integers(n_digits, n_content, shape)
    slot = np.where(task == DIGIT, about_digit, about_letter)
    asked_char, asked_colour = np.take_along_axis(char, slot, 1), np.take_along_axis(colour, slot, 1)

    order = _distinct(rng, batch, cells, cells)
    return Lookups(
        char_BN=np.take_along_axis(char, order, 1),
        colour_BN=np.take_along_axis(colour, order, 1),
        task_BG=task,
        argument_BG=np.where(task == DIGIT, asked_colour, asked_char),
        answer_BG=np.where(task == DIGIT, asked_char, asked_colour),
    )


def _distinct(rng: np.random.Generator, batch: int, total: int, n: int) -> Ids:
    """For each of `batch` rows, n different numbers below `total` in random order."""
    return rng.random((batch, total)).argsort(axis=1)[:, :n]
