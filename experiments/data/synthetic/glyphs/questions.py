"""Questions about glyphs, each with exactly one right answer: about a scene, or about a list of named cells.

`questions` asks about a picture; `draw_lookups` draws contexts without a picture, which train the language model alone.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.data.sample import Box
from experiments.data.synthetic.glyphs.scene import (
    ASPECTS,
    CHARS,
    COLOURS,
    DIGITS,
    FINE,
    FIRST_DIGIT,
    FIRST_FOIL,
    FIRST_LETTER,
    GRID,
    LETTERS,
    SHAPE_SIDE,
    SHAPES,
    TASKS,
    GlyphScene,
    keys,
)
from shirg import UserError

Ids = npt.NDArray[np.int64]

ARGUMENTS = {"digit": COLOURS[1:], "letter": LETTERS, "shape": ASPECTS}
"""The second words of the questions of each task."""
WORDS = tuple(word for words in ARGUMENTS.values() for word in words)
DIGIT, LETTER = TASKS.index("digit"), TASKS.index("letter")
"""Values of `Lookups.task_BG`."""


@dataclass(frozen=True)
class GlyphQuestion:
    """A question about a scene, and the box that shows its answer."""

    text: str
    answer: str
    subtask: str
    """"digit", "letter", "shape_kind" or "shape_colour"."""
    box: Box
    """The glyph's cell or the shape's box."""

    @property
    def group(self) -> Literal["fine", "guard"]:
        return "fine" if self.subtask in FINE else "guard"


def ask(scene: GlyphScene, task: str, argument: str) -> GlyphQuestion:
    """The question "`task` `argument`"; raises when the scene has no answer to it or more than one."""
    text = f"{task} {argument}"
    if task == "shape" and argument in ASPECTS:
        if len(scene.shapes) != 1:
            raise UserError(f"{text!r} needs exactly one big shape; this scene has {len(scene.shapes)}")
        (shape,) = scene.shapes
        answer = SHAPES[shape.kind] if argument == "kind" else COLOURS[shape.colour]
        return GlyphQuestion(text, answer, f"shape_{argument}", _box(shape.row, shape.col, SHAPE_SIDE))
    char, colour = scene.char_RC, scene.colour_RC
    if task == "digit" and argument in COLOURS[1:]:
        matches = (char >= FIRST_DIGIT) & (char < FIRST_LETTER) & (colour == COLOURS.index(argument))
    elif task == "letter" and argument in CHARS[FIRST_LETTER:FIRST_FOIL]:
        matches = (char == CHARS.index(argument)) & (colour > 0)
    else:
        raise UserError(f"{text!r} is not a question about glyph pictures")
    cells = np.argwhere(matches)
    if len(cells) != 1:
        raise UserError(f"{text!r} must have exactly one answer; this scene has {len(cells)}")
    row, col = map(int, cells[0])
    answer = CHARS[char[row, col]] if task == "digit" else COLOURS[colour[row, col]]
    return GlyphQuestion(text, answer, task, _box(row, col, 1))


def questions(
    scene: GlyphScene, *, n: int, tasks: Sequence[str] = TASKS, words: Collection[str] = WORDS
) -> list[GlyphQuestion]:
    """`n` different questions that ask for one of the words, the tasks in turn.

    They depend on the scene alone; fewer are a prefix of more.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"tasks={list(tasks)} must name some of {', '.join(TASKS)}")
    rng = random.Random(scene.look)
    open_questions = {}
    for task in TASKS:
        arguments = _arguments(scene, task)
        rng.shuffle(arguments)
        open_questions[task] = [argument for argument in arguments if argument in words]
    asked = []
    for turn in range(n):
        task = tasks[turn % len(tasks)]
        if not open_questions[task]:
            raise UserError(f"qa_per_image={n} is more than a picture can answer with tasks {list(tasks)}: lower it")
        asked.append(ask(scene, task, open_questions[task].pop()))
    return asked


def _arguments(scene: GlyphScene, task: str) -> list[str]:
    """The second words of the questions of a task that this scene answers."""
    if task == "shape":
        return list(ASPECTS)
    return list(COLOURS[1:]) if task == "digit" else keys(scene)


def _box(row: int, col: int, side: int) -> Box:
    return (col / GRID, row / GRID, (col + side) / GRID, (row + side) / GRID)


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
        raise UserError(f"cells={cells}, batch={batch}, questions={questions}: need at least 2, 1 and 1")
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
