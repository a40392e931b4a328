"""Relaxed accuracy, the metric of ChartQA (Masry et al., 2022): numbers may be 5 % off."""

from collections.abc import Sequence

from experiments.metrics.mean import TextMetric

TOLERANCE = 0.05


def to_number(text: str) -> float | None:
    """What `float` reads, with a trailing percent sign as 1/100. Thousands commas and units are not numbers."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(*, prediction: str, target: str) -> bool:
    """Whether a number is within 5 % of the target, or else the texts are equal but for case.

    The tolerance is relative to the target, so the arguments cannot be swapped: both are keywords. A target of 0
    leaves no tolerance and is compared as text. NaN and infinities match nothing. Texts are compared as they are, outer
    space included.
    """
    guess, truth = to_number(prediction), to_number(target)
    if guess is not None and truth:
        return abs(guess - truth) / abs(truth) <= TOLERANCE
    return prediction.lower() == target.lower()


def relaxed_accuracy(*, prediction: str, references: Sequence[str]) -> float | None:
    """1 when the prediction matches a reference, else 0; None without references."""
    if not references:
        return None
    return float(any(relaxed_match(prediction=prediction, target=target) for target in references))


class RelaxedAccuracy(TextMetric):
    """Share of answers that match within the tolerance."""

    def score(self, *, prediction: str, references: Sequence[str]) -> float | None:
        return relaxed_accuracy(prediction=prediction, references=references)
