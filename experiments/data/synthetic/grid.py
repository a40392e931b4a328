"""`data=synth_grid`: four boards of 8x8 squares with small coloured marks; where a mark is, and how many there are.

A mark is asked for by colour and kind together, and marks that share only one of them are next to it. Squares have the
names of a chessboard's, "a1" at the lower left of each board; no mark is on two boards.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from random import Random

from experiments.data.synthetic.board import KINDS, Board, Cell, Stamp, blocks_of, free_cells
from experiments.data.synthetic.board_task import Question, SynthTask
from experiments.data.synthetic.glyphs.scene import COLOURS
from experiments.data.synthetic.text_context import column_word, row_word

ALONE = 10
"""Marks that occur once; one mark each occurs twice, three, four and five times."""
COUNTS = range(6)
MOST_EXTRA = 80


class SynthGrid(SynthTask):
    """Positions and counts: "where red disc" -> "c5", "count red disc" -> "3".

    For the answer 0 the evidence is the marks that share the kind or the colour.
    """

    name = "synth_grid"
    TASKS = ("where", "count")
    LOOKUPS = ("where",)
    METRICS = ("exact_match", "entity_recall")

    @classmethod
    def compose(cls, rng: Random, crowd: float) -> Board:
        several = COUNTS[2:]
        kinds: set[str] = set()
        while len(kinds) < len(KINDS):
            sorts = rng.sample(list(product(COLOURS[1:], KINDS)), ALONE + len(several))
            kinds = {kind for _, kind in sorts}
        sorts = [*sorts, *(sort for sort, n in zip(sorts[ALONE:], several, strict=True) for _ in range(n - 1))]
        cells = [cell for block in blocks_of(rng, len(sorts) // 4) for cell in block]
        rng.shuffle(cells)
        marks = [_mark(cell, kind, colour) for cell, (colour, kind) in zip(cells, sorts, strict=True)]
        extra = rng.sample(free_cells(set(cells)), round(crowd * MOST_EXTRA))
        crowding = [_mark(cell, rng.choice(KINDS), "") for cell in extra]
        return Board((*marks, *crowding), rng.getrandbits(63))

    @classmethod
    def questions(cls, board: Board, rng: Random) -> Mapping[str, list[Question]]:
        found: dict[tuple[str, str], list[Stamp]] = defaultdict(list)
        for mark in board.stamps:
            found[mark.colour, mark.mark].append(mark)
        where = [
            Question(f"where {colour} {kind}", square(marks[0]), tuple(marks))
            for (colour, kind), marks in found.items()
            if colour and len(marks) == 1
        ]
        rng.shuffle(where)
        # Answers are chosen before marks: each count once, in random order, whatever is common on the board.
        by_count: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for sort in product(COLOURS[1:], KINDS):
            by_count[len(found.get(sort, ()))].append(sort)
        count = []
        for n in rng.sample(COUNTS, len(COUNTS)):
            colour, kind = rng.choice(by_count[n])
            alike = tuple(mark for mark in board.stamps if mark.colour and (mark.mark == kind or mark.colour == colour))
            count.append(
                Question(f"count {colour} {kind}", str(n), tuple(found.get((colour, kind), alike)), absent=n == 0)
            )
        return {"where": where, "count": count}


def square(mark: Stamp) -> str:
    """The name of the square on its own board."""
    return column_word(mark.col)[-1] + row_word(mark.row)[-1]


def _mark(cell: Cell, kind: str, colour: str) -> Stamp:
    return Stamp(
        *cell, kind, colour, words=(kind, *([colour] if colour else []), row_word(cell[0]), column_word(cell[1]))
    )
