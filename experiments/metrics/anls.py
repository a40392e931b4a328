"""Average normalised Levenshtein similarity (Biten et al., 2019), the metric of DocVQA, as lmms-eval computes it."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from experiments.metrics.exact_match import fold_case
from experiments.metrics.mean import TextMetric


def anls(
    *, prediction: str, references: Sequence[str], threshold: float = 0.5, strict_threshold: bool = False
) -> float | None:
    """Similarity in [0, 1] to the nearest reference; None without references.

    The edits are counted on the folded texts but divided by the length of the texts as given, in upper case (where
    some letters become two): outer and repeated spaces therefore raise the score unless the caller removes them.

    Args:
        threshold: lower similarities score 0.
        strict_threshold: a similarity of exactly `threshold` scores 0 too, as in the paper.
    """
    if not references:
        return None
    similarity = 1 - min(_distance(prediction, reference) for reference in references)
    dropped = similarity <= threshold if strict_threshold else similarity < threshold
    return 0.0 if dropped else similarity


def _distance(prediction: str, reference: str) -> float:
    longest = max(len(prediction.upper()), len(reference.upper()))
    return Levenshtein.distance(fold_case(prediction), fold_case(reference)) / longest if longest else 0.0


class Anls(TextMetric):
    """Mean similarity to the nearest reference."""

    def __init__(self, *, threshold: float = 0.5, strict_threshold: bool = False, clean: bool = False) -> None:
        super().__init__(clean=clean)
        self.threshold = threshold
        self.strict_threshold = strict_threshold

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return anls(
            prediction=prediction,
            references=references,
            threshold=self.threshold,
            strict_threshold=self.strict_threshold,
        )
