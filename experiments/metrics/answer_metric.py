"""The base classes of all metrics, and the cleaning of answers before they are compared.

Scores of cleaned answers are reported beside those of the raw text, never instead of them.
"""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

CLEANER = "clean_answer/1"
"""Name and version, stored in every result. Increase the number when the rules of `clean_answer` change."""

_LEAD = re.compile(r"^(?:the answer is|answer is|answer)\s*:?\s+|^answer:", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"[$€£¥₹]\s*(?=[-+]?[\d.])|(?<=\d)\s*[$€£¥₹]")


def clean_answer(text: str) -> str:
    """The text without a leading "the answer is" or "answer:", one pair of quotes around it, one trailing period,
    commas between thousands, and currency signs next to a number.

    A percent sign stays, because without it the value would be another. Numbers keep their digits and signs.
    """
    text = _LEAD.sub("", text.strip()).strip()
    text = _unquote(text)
    if text.endswith(".") and not text.endswith(".."):
        text = _unquote(text[:-1].rstrip())
    return _CURRENCY.sub("", _THOUSANDS.sub("", text)).strip()


def _unquote(text: str) -> str:
    quoted = len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]
    return text[1:-1].strip() if quoted else text


class EvalMetric:
    """A quantity that an evaluation reports for each sample and averages over the samples that have a value."""

    higher_is_better: ClassVar[bool] = True


class AnswerMetric(EvalMetric):
    """A metric that compares answers with their references.

    Args:
        clean: compare what `clean_answer` leaves of the answer and of the references.
    """

    reference: ClassVar[Literal["answers", "target"]] = "answers"
    """Whether all accepted answers of a sample are its references, or only its target."""

    def __init__(self, *, clean: bool = False) -> None:
        self.clean = clean


class TextMetric(AnswerMetric):
    """A metric that scores each answer by itself."""

    def score(self, *, prediction: str, references: Sequence[str]) -> float | None:
        """Score of one answer; None when it has no references."""
        if self.clean:
            return self.compare(clean_answer(prediction), [clean_answer(reference) for reference in references])
        return self.compare(prediction, references)

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        """The score of the texts as they are."""
        raise NotImplementedError(f"{type(self).__name__} must override compare")
