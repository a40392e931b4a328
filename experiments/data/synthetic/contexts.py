"""Text twins of the four families' pictures: what is on a board as bags of words, and a question about it.

With them the language model learns to look things up before it sees any picture, as with `glyphs.lookup`.
"""

from dataclasses import dataclass
from random import Random

from experiments.data.synthetic.task import SynthTask

Bag = tuple[str, ...]
PER_BOARD = 8
"""Questions about one board, each in a context of its own; boards take longer to draw than to ask."""


@dataclass(frozen=True)
class TextContext:
    """Bags in random order, empty ones for blank cells, with one question that they answer."""

    bags: tuple[Bag, ...]
    question: str
    answer: str


def draw_contexts(rng: Random, family: type[SynthTask], *, n: int, cells: int) -> list[TextContext]:
    """`n` contexts of `cells` cells each: the evidence, then whatever else is on the board, then blanks."""
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
