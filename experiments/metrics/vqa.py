"""Soft accuracy of VQAv2 and TextVQA, with the answer normaliser of the VQA evaluation as lmms-eval applies it.

The normaliser's oddities are kept, because the published scores depend on them.
The tables in vqa_tables.json are facts of the evaluation (VQA authors, BSD-2-Clause). Contractions with a capital
letter can never apply, because the text is lower case by then.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from experiments.metrics.answer_metric import TextMetric
from shirg import UserError

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
"""A period with no digit behind it. What was meant as a look-behind is a look-ahead that always holds."""
_PERIODS = 32
"""At most so many periods are deleted: the reference passes a flag, whose value is 32, where a count is expected."""

ENOUGH = 4
"""With fewer references not even an answer that all of them gave scores 1; with one reference the score is always 0."""

Rules = Literal["vqav2", "textvqa"]


def normalise(text: str) -> str:
    """What VQAv2 compares: the text with its punctuation, number words, articles and contractions normalised."""
    return _digits_and_articles(_punctuation(re.sub(r"[\n\t]", " ", text).strip()))


def normalise_words(text: str) -> str:
    """What TextVQA compares: `normalise` of the text without commas and question marks, the possessive split off."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(text.strip())


@cache
def tables() -> dict[str, Any]:
    """The content of vqa_tables.json: articles, contractions, number words, punctuation."""
    text = files("experiments.metrics").joinpath("vqa_tables.json").read_text(encoding="utf-8")
    loaded = json.loads(text)
    assert isinstance(loaded, dict)
    return loaded


def _punctuation(text: str) -> str:
    """Deletes marks that are next to a space, and all marks if a comma splits a number; others become spaces."""
    out = text
    for mark in tables()["punctuation"]:
        alone = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        out = out.replace(mark, "" if alone else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _digits_and_articles(text: str) -> str:
    numbers, contractions = tables()["number_words"], tables()["contractions"]
    words = (numbers.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in tables()["articles"])


_NORMALISERS = {"vqav2": normalise, "textvqa": normalise_words}


def vqa_accuracy(*, prediction: str, references: Sequence[str], rules: Rules = "vqav2") -> float | None:
    """Mean over the people of min(1, others who gave this answer / 3); None without references.

    With 10 references, 1, 2, 3 and 4 matches score 0.3, 0.6, 0.9 and 1.
    """
    if not references:
        return None
    same = _NORMALISERS[rules]
    answer = same(prediction)
    given = [same(reference) == answer for reference in references]
    return sum(min(1.0, (sum(given) - own) / 3) for own in given) / len(given)


class VqaAccuracy(TextMetric):
    """Mean soft accuracy.

    Args:
        rules: the benchmark whose normaliser is used.
        few: accept samples with fewer than 4 references, which can never score 1.

    Raises:
        UserError: a sample has 1 to 3 references, and `few` is False.
    """

    def __init__(self, *, rules: Rules = "vqav2", few: bool = False, clean: bool = False) -> None:
        super().__init__(clean=clean)
        self.rules: Rules = rules
        self.few = few

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        if 0 < len(references) < ENOUGH and not self.few:
            raise UserError(
                f"soft accuracy needs the answers of {ENOUGH} or more people, and a sample has {len(references)}: "
                "score it by exact_match (data.metrics=[exact_match])"
            )
        return vqa_accuracy(prediction=prediction, references=references, rules=self.rules)
