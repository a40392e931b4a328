"""Text contexts of the four task families, which train the language model without pictures, and their words.

The words here are those that glyph pictures do not use; the tokenizer makes each one token.
"""

from dataclasses import dataclass
from random import Random

from experiments.data.synthetic.board import PANEL, PARTS
from experiments.data.synthetic.board_task import SynthTask

ROWS = tuple(f"row-{i}" for i in range(1, PANEL + 1))
"""Rows of a quarter of the picture, from its bottom to its top."""
COLUMNS = tuple(f"column-{c}" for c in "abcdefgh")
HEIGHTS = tuple(f"part-{i}" for i in range(PARTS))
TENS, ONES = "tens", "ones"
PLACES = (*ROWS, *COLUMNS, *HEIGHTS, TENS, ONES)
"""Words that only name what a token shows; no question or answer contains them."""
TASKS = ("value", "field", "where", "count", "paint", "form", "many", "any")
"""First words of questions."""
THING = "shapes"
"""The second word of a "many" question."""
YES, NO = "yes", "no"
PER_BOARD = 8
"""Questions about one board, each in its own context; several, because drawing a board takes longer than asking."""

Bag = tuple[str, ...]


def row_word(row: int) -> str:
    """The word for a row of cells of the picture."""
    return ROWS[PANEL - 1 - row % PANEL]


def column_word(col: int) -> str:
    return COLUMNS[col % PANEL]


@dataclass(frozen=True)
class TextContext:
    """Bags in random order, empty ones for blank cells, with one question that they answer."""

    bags: tuple[Bag, ...]
    question: str
    answer: str


def draw_contexts(rng: Random, family: type[SynthTask], *, n: int, cells: int) -> list[TextContext]:
    """`n` contexts of `cells` cells each: the evidence, other stamps of the board, and blanks if cells are left."""
    drawn: list[TextContext] = []
    while len(drawn) < n:
        board = family.compose(rng, rng.random())
        asked = [q for task in family.LOOKUPS for q in family.questions(board, rng)[task]]
        for question in rng.sample(asked, min(PER_BOARD, len(asked))):
            evidence = question.evidence[:cells] if question.absent else question.evidence
            if len(evidence) > cells:
                continue
            others = [stamp for stamp in board.stamps if stamp not in evidence]
            kept = [*evidence, *rng.sample(others, min(len(others), cells - len(evidence)))]
            bags = [stamp.words for stamp in kept] + [()] * (cells - len(kept))
            rng.shuffle(bags)
            drawn.append(TextContext(tuple(bags), question.text, question.answer))
    return drawn[:n]
