"""Relaxed accuracy, the metric of ChartQA (Masry et al., 2022): numbers may be 5 % off."""

from collections.abc import Sequence

from experiments.metrics.mean import TextMetric

TOLERANCE = 0.05
YEARS = range(1900, 2101)


def to_number(text: str) -> float | None:
    """What `float` reads, with a trailing percent sign as 1/100. Thousands commas and units are not numbers."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(*, prediction: str, target: str, strict_year: bool = False) -> bool:
    """Whether a number is within 5 % of the target, or else the texts are equal but for case.

    The tolerance is relative to the target, so the arguments cannot be swapped: both are keywords. A target of 0
    leaves no tolerance and is compared as text. NaN and infinities match nothing. Texts are compared as they are, outer
    space included.

    Args:
        strict_year: a target that is a whole number from 1900 to 2100 has no tolerance: as a year it is 100 years off
            within 5 %.
    """
    guess, truth = to_number(prediction), to_number(target)
    if guess is not None and truth:
        if strict_year and truth in YEARS:
            return guess == truth
        return abs(guess - truth) / abs(truth) <= TOLERANCE
    return prediction.lower() == target.lower()


def relaxed_accuracy(*, prediction: str, references: Sequence[str], strict_year: bool = False) -> float | None:
    """1 when the prediction matches a reference, else 0; None without references."""
    if not references:
        return None
    match = (relaxed_match(prediction=prediction, target=t, strict_year=strict_year) for t in references)
    return float(any(match))


class RelaxedAccuracy(TextMetric):
    """Share of answers that match within the tolerance."""

    def __init__(self, *, strict_year: bool = False, clean: bool = False) -> None:
        super().__init__(clean=clean)
        self.strict_year = strict_year

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return relaxed_accuracy(prediction=prediction, references=references, strict_year=self.strict_year)
