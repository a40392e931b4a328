"""Exact match for short answers about entities: number words are numbers, and words for the same place are one."""

import re
from collections.abc import Sequence

from experiments.metrics.mean import TextMetric
from experiments.metrics.vqa_normalise import tables

_SAME = {
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
_PLACES = frozenset({"top", "bottom", "left", "right", "centre"})


def entity_form(text: str) -> str:
    """The form that is compared: lower case, no punctuation, no article in front, digits for number words, one word
    for each synonym; of a place it does not matter which word stands first.

    Other articles stay: "letter A" ends in one.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) > 1 and words[0] in tables()["articles"]:
        words = words[1:]
    words = [_SAME.get(word, word) for word in words]
    if _PLACES.issuperset(words):
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
