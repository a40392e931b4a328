"""Token F1 and exact match of SQuAD (Rajpurkar et al., 2016): lower case, no ASCII punctuation, no articles.

The normalisation turns "-5" into "5" and "3/4" into "34", and F1 is blind to order: "row 3 col 2" scores 1 against
"row 2 col 3". Where signs or order matter, trust exact match.
"""

from collections.abc import Sequence
from typing import Literal

from torchmetrics.functional.text import squad

from experiments.metrics.mean import TextMetric


def squad_score(*, prediction: str, references: Sequence[str], kind: Literal["f1", "exact_match"]) -> float | None:
    """The best score over the references, in [0, 1]; two texts without tokens match. None without references."""
    if not references:
        return None
    answers: dict[str, list[str] | list[int]] = {"text": list(references), "answer_start": [0] * len(references)}
    scores = squad({"prediction_text": prediction, "id": ""}, {"answers": answers, "id": ""})
    return float(scores[kind]) / 100


class TokenF1(TextMetric):
    """Mean F1 of the tokens that prediction and reference share, with repetition."""

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return squad_score(prediction=prediction, references=references, kind="f1")


class SquadExactMatch(TextMetric):
    """Share of answers equal to a reference after SQuAD's normalisation."""

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return squad_score(prediction=prediction, references=references, kind="exact_match")
