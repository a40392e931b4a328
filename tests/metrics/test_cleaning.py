"""What cleaning takes off an answer, and what it leaves on."""

import pytest

from experiments.metrics import metric
from experiments.metrics.answer_metric import CLEANER, clean_answer


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (" Yes. ", "Yes"),
        ("The answer is 42.", "42"),
        ("Answer: blue", "blue"),
        ("answer:blue", "blue"),
        ("answering machine", "answering machine"),
        ('"North America"', "North America"),
        ('"Yes."', "Yes"),
        ('"Yes".', "Yes"),
        ("“left”", "left"),
        ("it's", "it's"),
        ("1,234,567", "1234567"),
        ("1,23", "1,23"),
        ("2,010", "2010"),
        ("red, blue", "red, blue"),
        ("$5,000.50", "5000.50"),
        ("-$5", "-5"),
        ("5 €", "5"),
        ("US$", "US$"),
        ("63%", "63%"),
        ("-5", "-5"),
        ("3.", "3"),
        ("...", "..."),
        ("", ""),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_cleaning(text: str, left: str) -> None:
    assert clean_answer(text) == left


def test_it_has_a_name_and_a_version() -> None:
    assert CLEANER == "clean_answer/1"


def test_references_are_cleaned_alike() -> None:
    """Else the very text of a reference would be wrong."""
    for name in ("exact_match", "anls", "relaxed_accuracy"):
        for reference in ("$5,000", "1,234", '"yes".'):
            assert metric(f"{name}_clean").score(prediction=reference, references=[reference]) == 1
    assert metric("relaxed_accuracy").score(prediction="1,234", references=["1234"]) == 0
    assert metric("relaxed_accuracy_clean").score(prediction="1,234", references=["1234"]) == 1
    assert metric("relaxed_accuracy_clean").score(prediction="63", references=["63%"]) == 0
