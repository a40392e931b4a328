"""Metrics of short answers: exact match, ANLS (DocVQA), relaxed accuracy (ChartQA), SQuAD's scores, entity match.

Each is a function of one prediction and its references, with a class that gives it a name in `data.metrics`.
"""

import re
from collections.abc import Sequence
from typing import Literal

from rapidfuzz.distance import Levenshtein
from torchmetrics.functional.text import squad

from experiments.metrics.answer_metric import TextMetric
from experiments.metrics.vqa import tables

TOLERANCE = 0.05
"""Of relaxed accuracy, relative to the target."""
YEARS = range(1900, 2101)
"""Targets that relaxed accuracy reads as years with `strict_year`."""
SYNONYMS = {
    "center": "centre",
    "middle": "centre",
    "upper": "top",
    "lower": "bottom",
    "disc": "circle",
    "disk": "circle",
    "rhombus": "diamond",
    "plus": "cross",
    "grey": "gray",
}
"""Words that entity match takes for the same."""
PLACES = frozenset({"top", "bottom", "left", "right", "centre"})


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


def word_accuracy(*, prediction: str, references: Sequence[str]) -> float | None:
    """1 - edit distance of the words / the larger number of words, of the nearest reference; None without any.

    A word that is left out costs one word, and not the place of all that follow.
    """
    said = fold_case(prediction).split()
    wanted = [fold_case(reference).split() for reference in references]
    return max((Levenshtein.normalized_similarity(said, words) if words else 0.0 for words in wanted), default=None)


class WordAccuracy(TextMetric):
    """1 - edit distance of the words / the larger number of words: wrong, missing and additional words count once."""

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return word_accuracy(prediction=prediction, references=references)


def entity_form(text: str) -> str:
    """The form that is compared: lower case, no punctuation, no leading article, digits for number words, one word for
    all synonyms. The words of a place may come in any order: "left top" is "top left".

    Other articles stay, because "letter A" ends in one.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) > 1 and words[0] in tables()["articles"]:
        words = words[1:]
    words = [SYNONYMS.get(word, word) for word in words]
    if PLACES.issuperset(words):
        words = sorted(set(words))
    return " ".join(tables()["number_words"].get(word, word) for word in words)


def entity_match(*, prediction: str, references: Sequence[str]) -> float | None:
    """1 when the forms are equal for a reference, else 0; None without references."""
    if not references:
        return None
    return float(entity_form(prediction) in map(entity_form, references))


class EntityMatch(TextMetric):
    """Share of answers that match."""

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        return entity_match(prediction=prediction, references=references)
