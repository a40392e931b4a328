"""Questions that a scene answers, each with exactly one right answer and the place that shows it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.data.sample import Box
from experiments.data.synthetic.glyphs.scene import GRID, SHAPE_SIDE, GlyphScene
from experiments.data.synthetic.glyphs.vocabulary import (
    ASPECTS,
    CHARS,
    COLOURS,
    FINE,
    FIRST_DIGIT,
    FIRST_FOIL,
    FIRST_LETTER,
    SHAPES,
    TASKS,
)


@dataclass(frozen=True)
class GlyphQuestion:
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
            raise ValueError(f"{text!r} needs exactly one big shape; this scene has {len(scene.shapes)}")
        (shape,) = scene.shapes
        answer = SHAPES[shape.kind] if argument == "kind" else COLOURS[shape.colour]
        return GlyphQuestion(text, answer, f"shape_{argument}", _box(shape.row, shape.col, SHAPE_SIDE))
    char, colour = scene.char_RC, scene.colour_RC
    if task == "digit" and argument in COLOURS[1:]:
        matches = (char >= FIRST_DIGIT) & (char < FIRST_LETTER) & (colour == COLOURS.index(argument))
    elif task == "letter" and argument in CHARS[FIRST_LETTER:FIRST_FOIL]:
        matches = (char == CHARS.index(argument)) & (colour > 0)
    else:
        raise ValueError(f"{text!r} is not a question about glyph pictures")
    cells = np.argwhere(matches)
    if len(cells) != 1:
        raise ValueError(f"{text!r} must have exactly one answer; this scene has {len(cells)}")
    row, col = map(int, cells[0])
    answer = CHARS[char[row, col]] if task == "digit" else COLOURS[colour[row, col]]
    return GlyphQuestion(text, answer, task, _box(row, col, 1))


def questions(scene: GlyphScene, *, n: int, tasks: Sequence[str] = TASKS) -> list[GlyphQuestion]:
    """`n` different questions, the tasks in turn. The scene alone decides which; fewer are a prefix of more."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"tasks={list(tasks)} must name some of {', '.join(TASKS)}")
    rng = random.Random(scene.look)
    open_questions = {task: _arguments(scene, task) for task in TASKS}
    for arguments in open_questions.values():
        rng.shuffle(arguments)
    asked = []
    for turn in range(n):
        task = tasks[turn % len(tasks)]
        if not open_questions[task]:
            raise ValueError(f"qa_per_image={n} is more than a picture can answer with tasks {list(tasks)}: lower it")
        asked.append(ask(scene, task, open_questions[task].pop()))
    return asked


def _arguments(scene: GlyphScene, task: str) -> list[str]:
    """What can be asked of this scene."""
    if task == "shape":
        return list(ASPECTS)
    if task == "digit":
        return list(COLOURS[1:])
    keys = (scene.char_RC >= FIRST_LETTER) & (scene.char_RC < FIRST_FOIL) & (scene.colour_RC > 0)
    found, counts = np.unique(scene.char_RC[keys], return_counts=True)
    return [CHARS[char] for char in found[counts == 1]]


def _box(row: int, col: int, side: int) -> Box:
    return (col / GRID, row / GRID, (col + side) / GRID, (row + side) / GRID)
