"""Exact match, blind to case and white space."""

from collections.abc import Sequence

from experiments.metrics.mean import TextMetric


def fold_case(text: str) -> str:
    """Lower case, no outer space, single inner spaces. Punctuation and articles stay: "$5,000" is not "5000"."""
    return " ".join(text.lower().split())


def exact_match(*, prediction: str, references: Sequence[str]) -> float | None:
    """1 when the folded prediction equals a folded reference, else 0; None without references."""
    if not references:
        return None
    return float(fold_case(prediction) in map(fold_case, references))


class ExactMatch(TextMetric):
    """Share of answers that match exactly."""

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return exact_match(prediction=prediction, references=references)


class TargetMatch(ExactMatch):
    """Share of answers that match the one answer that the dataset itself names, VQAv2's `multiple_choice_answer`."""

    reference = "target"
