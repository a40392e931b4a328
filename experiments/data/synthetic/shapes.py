"""`data=synth_shapes`: one to four big shapes of 4x4 cells in different colours; the control of the families."""

from collections import Counter
from collections.abc import Mapping
from itertools import product
from random import Random

from experiments.data.synthetic.board import Board, Cell, Stamp, free_cells
from experiments.data.synthetic.board_task import Question, SynthTask
from experiments.data.synthetic.glyphs.scene import COLOURS, DIGITS, GRID, LETTERS, SHAPE_SIDE, SHAPES
from experiments.data.synthetic.text_context import NO, THING, YES

MOST = 4
MOST_EXTRA = 100


class SynthShapes(SynthTask):
    """Colour by kind, kind by colour, how many, and whether there is one of a colour.

    "paint circle" -> "red", "form red" -> "circle", "many shapes" -> "3", "any red" -> "yes". The evidence that there
    is none are all shapes of the picture.
    """

    name = "synth_shapes"
    TASKS = ("paint", "form", "many", "any")
    LOOKUPS = ("paint", "form", "any")
    METRICS = ("exact_match", "entity_recall")
    GUARD = True

    @classmethod
    def compose(cls, rng: Random, crowd: float) -> Board:
        n = rng.randint(1, MOST)
        colours = rng.sample(COLOURS[1:], n)
        kinds = rng.choices(SHAPES[1:], k=n)
        while 1 not in Counter(kinds).values():  # one kind must occur once, or no "paint" question could be asked
            kinds = rng.choices(SHAPES[1:], k=n)
        taken: set[Cell] = set()
        shapes = []
        for kind, colour in zip(kinds, colours, strict=True):
            row, col = _place(rng, taken)
            shapes.append(Stamp(row, col, kind, colour, words=(kind, colour)))
        named = (*DIGITS, *LETTERS)
        extra = rng.sample(free_cells(taken), round(crowd * MOST_EXTRA))
        glyphs = [
            Stamp(*cell, char, words=(char,))
            for cell, char in zip(extra, rng.choices(named, k=len(extra)), strict=True)
        ]
        return Board((*shapes, *glyphs), rng.getrandbits(63))

    @classmethod
    def questions(cls, board: Board, rng: Random) -> Mapping[str, list[Question]]:
        shapes = [stamp for stamp in board.stamps if stamp.mark in SHAPES]
        rng.shuffle(shapes)
        counts = Counter(shape.mark for shape in shapes)
        there = [Question(f"any {shape.colour}", YES, (shape,)) for shape in shapes]
        absent = sorted({*COLOURS[1:]} - {shape.colour for shape in shapes})
        missing = [
            Question(f"any {colour}", NO, tuple(shapes), absent=True) for colour in rng.sample(absent, len(there))
        ]
        # Pairs of a yes and a no, so that either comes first half of the time.
        either = [q for pair in zip(there, missing, strict=True) for q in rng.sample(pair, 2)]
        return {
            "paint": [Question(f"paint {s.mark}", s.colour, (s,)) for s in shapes if counts[s.mark] == 1],
            "form": [Question(f"form {s.colour}", s.mark, (s,)) for s in shapes],
            "many": [Question(f"many {THING}", str(len(shapes)), tuple(shapes))],
            "any": either,
        }


def _place(rng: Random, taken: set[Cell]) -> Cell:
    """Adds a free square of 4x4 cells to `taken`, and returns its top left cell."""
    while True:
        row, col = (rng.randrange(GRID - SHAPE_SIDE + 1) for _ in range(2))
        wanted = {(row + r, col + c) for r, c in product(range(SHAPE_SIDE), repeat=2)}
        if taken.isdisjoint(wanted):
            taken |= wanted
            return row, col
