"""`data=synth_chart`: a dot plot in four panels; each of eight series has one bar, and its height is its value.

A panel is a quarter of the picture and its scale goes from 10 at its bottom to 90 at its top, so that a cell is worth
10 and a quarter of a cell 2.5. There are four bars in a pooling block.
"""

from collections.abc import Mapping
from random import Random

from experiments.data.synthetic.board import BAR, PARTS, Board, Cell, Stamp, blocks_of, free_cells
from experiments.data.synthetic.board_task import Question, SynthTask
from experiments.data.synthetic.glyphs.scene import COLOURS
from experiments.data.synthetic.text_context import HEIGHTS, ROWS, row_word

UNITS = ("0", "2", "5", "7")
"""Last digit of the value by the height in the cell: 2.5 apart, rounded down."""
MOST_EXTRA = 100


class SynthChart(SynthTask):
    """Reads a value of two digits off a bar's height: "value red" -> "57"."""

    name = "synth_chart"
    TASKS = ("value",)
    LOOKUPS = ("value",)
    METRICS = ("relaxed_accuracy", "exact_match", "entity_recall")

    @classmethod
    def compose(cls, rng: Random, crowd: float) -> Board:
        cells = [cell for block in blocks_of(rng, (len(COLOURS) - 1) // 4) for cell in block]
        rng.shuffle(cells)
        bars = [_bar(rng, cell, colour) for cell, colour in zip(cells, COLOURS[1:], strict=True)]
        extra = [_bar(rng, cell, "") for cell in rng.sample(free_cells(set(cells)), round(crowd * MOST_EXTRA))]
        return Board((*bars, *extra), rng.getrandbits(63), axes=True)

    @classmethod
    def patchwork(cls, rng: Random) -> Board:
        share = rng.uniform(0.3, 0.9)
        bars = [_bar(rng, cell, rng.choice(COLOURS)) for cell in free_cells(set()) if rng.random() < share]
        return Board(tuple(bars), rng.getrandbits(63), axes=True)

    @classmethod
    def questions(cls, board: Board, rng: Random) -> Mapping[str, list[Question]]:
        asked = [Question(f"value {bar.colour}", value(bar), (bar,)) for bar in board.stamps if bar.colour]
        rng.shuffle(asked)
        return {"value": asked}


def value(bar: Stamp) -> str:
    tens = ROWS.index(row_word(bar.row)) + 1
    return f"{tens}{UNITS[bar.part]}"


def _bar(rng: Random, cell: Cell, colour: str) -> Stamp:
    part = rng.randrange(PARTS)
    return Stamp(*cell, BAR, colour, part, (*([colour] if colour else []), row_word(cell[0]), HEIGHTS[part]))
