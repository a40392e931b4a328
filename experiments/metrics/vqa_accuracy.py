"""The soft accuracy of VQA (Antol et al., 2015): right in the measure in which people gave the same answer."""

from collections.abc import Sequence
from typing import Literal

from experiments.metrics.mean import TextMetric
from experiments.metrics.vqa_normalise import normalise, normalise_words

ENOUGH = 4
"""With fewer references even an answer that all gave cannot score 1; a single one always scores 0."""
_NORMALISERS = {"vqav2": normalise, "textvqa": normalise_words}

Rules = Literal["vqav2", "textvqa"]


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
        rules: whose normaliser is used.
        few: accept samples with fewer than 4 references, which can never score 1.

    Raises:
        ValueError: a sample has 1 to 3 references, and `few` was not asked for.
    """

    def __init__(self, *, rules: Rules = "vqav2", few: bool = False, clean: bool = False) -> None:
        super().__init__(clean=clean)
        self.rules: Rules = rules
        self.few = few

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        if 0 < len(references) < ENOUGH and not self.few:
            raise ValueError(
                f"soft accuracy needs the answers of {ENOUGH} or more people, and a sample has {len(references)}: "
                "score it by exact_match (data.metrics=[exact_match])"
            )
        return vqa_accuracy(prediction=prediction, references=references, rules=self.rules)
