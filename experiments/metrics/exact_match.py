"""Exact match, blind to case and white space."""

from collections.abc import Sequence

from experiments.metrics.mean import TextMetric


def clean(text: str) -> str:
    """Lower case, no outer space, single inner spaces. Punctuation and articles stay: "$5,000" is not "5000"."""
    return " ".join(text.lower().split())


def exact_match(*, prediction: str, references: Sequence[str]) -> float | None:
    """1 when the cleaned prediction equals a cleaned reference, else 0; None without references."""
    if not references:
        return None
    return float(clean(prediction) in map(clean, references))


class ExactMatch(TextMetric):
    """Share of answers that match exactly."""

    def score(self, *, prediction: str, references: Sequence[str]) -> float | None:
        return exact_match(prediction=prediction, references=references)
