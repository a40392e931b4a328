"""The words of the four task families that glyph pictures do not know; the tokenizer makes each one token."""

from experiments.data.synthetic.board import KINDS, PANEL, PARTS

ROWS = tuple(f"row-{i}" for i in range(1, PANEL + 1))
"""Rows of a quarter of the picture, from its bottom to its top."""
COLUMNS = tuple(f"column-{c}" for c in "abcdefgh")
HEIGHTS = tuple(f"part-{i}" for i in range(PARTS))
TENS, ONES = "tens", "ones"
PLACES = (*ROWS, *COLUMNS, *HEIGHTS, TENS, ONES)
"""Words that only name what a token shows; nobody says them in a question or an answer."""
TASKS = ("value", "field", "where", "count", "paint", "form", "many", "any")
"""First words of questions."""
THING = "shapes"
"""What "many" asks for."""
YES, NO = "yes", "no"


def row_word(row: int) -> str:
    """The word for a row of cells of the picture."""
    return ROWS[PANEL - 1 - row % PANEL]


def column_word(col: int) -> str:
    return COLUMNS[col % PANEL]


__all__ = [
    "COLUMNS",
    "HEIGHTS",
    "KINDS",
    "NO",
    "ONES",
    "PLACES",
    "ROWS",
    "TASKS",
    "TENS",
    "THING",
    "YES",
    "column_word",
    "row_word",
]
