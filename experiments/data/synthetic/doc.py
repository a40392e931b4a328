"""`data=synth_doc`: a page in four columns of lines, each a key of one letter and a value of two digits.

Lines are one cell apart and come in pairs, so that pooling averages two lines of a pair. Keys that no question asks
for fill the page.
"""

from collections.abc import Mapping
from random import Random

from experiments.data.synthetic.board import Board, Cell, Stamp
from experiments.data.synthetic.board_task import Question, SynthTask
from experiments.data.synthetic.glyphs.scene import DIGITS, FOILS, GRID, LETTERS
from experiments.data.synthetic.text_context import ONES, TENS

SLOT = 4
"""Cells of a line: key, tens, ones and a gap."""
MOST_EXTRA = 40


class SynthDoc(SynthTask):
    """Finds a key and reads its value: "field K" -> "37"."""

    name = "synth_doc"
    TASKS = ("field",)
    LOOKUPS = ("field",)
    METRICS = ("anls", "exact_match", "entity_recall")

    @classmethod
    def compose(cls, rng: Random, crowd: float) -> Board:
        pairs = [(r, c) for r in range(0, GRID, 2) for c in range(0, GRID, SLOT)]
        rng.shuffle(pairs)
        places = [(r + second, c) for r, c in pairs for second in (0, 1)]
        keys = [*rng.sample(LETTERS, len(LETTERS)), *rng.choices(FOILS, k=round(crowd * MOST_EXTRA))]
        stamps = [stamp for key, place in zip(keys, places, strict=False) for stamp in _line(rng, key, place)]
        return Board(tuple(stamps), rng.getrandbits(63), paper=True)

    @classmethod
    def patchwork(cls, rng: Random) -> Board:
        share = rng.uniform(0.4, 1.0)
        places = [(r, c) for r in range(GRID) for c in range(0, GRID, SLOT) if rng.random() < share]
        keys = [rng.choice(LETTERS if rng.random() < 0.9 else FOILS) for _ in places]
        stamps = [stamp for key, place in zip(keys, places, strict=True) for stamp in _line(rng, key, place)]
        return Board(tuple(stamps), rng.getrandbits(63), paper=True)

    @classmethod
    def questions(cls, board: Board, rng: Random) -> Mapping[str, list[Question]]:
        lines = [board.stamps[i : i + 3] for i in range(0, len(board.stamps), 3)]
        asked = [
            Question(f"field {line[0].mark}", line[1].mark + line[2].mark, tuple(line))
            for line in lines
            if line[0].mark in LETTERS
        ]
        rng.shuffle(asked)
        return {"field": asked}


def _line(rng: Random, key: str, place: Cell) -> list[Stamp]:
    """Key, tens and ones; the cells of a value are named by their key too."""
    row, col = place
    named = (key,) if key in LETTERS else ()
    tens, ones = rng.choice(DIGITS[1:]), rng.choice(DIGITS)
    return [
        Stamp(row, col, key, words=named),
        Stamp(row, col + 1, tens, words=(tens, TENS, *named)),
        Stamp(row, col + 2, ones, words=(ones, ONES, *named)),
    ]
