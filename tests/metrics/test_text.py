"""Metrics of short answers and the cleaning before them: edge cases by hand, refusals."""

import pytest

from experiments.metrics import METRICS, TextMetric, anls, entity_match, exact_match, metric, relaxed_accuracy
from experiments.metrics.answer_metric import clean_answer
from experiments.metrics.text import relaxed_match, word_accuracy

TEXT_METRICS = [name for name in METRICS if isinstance(metric(name), TextMetric)]


def test_anls_at_its_threshold() -> None:
    at_half = {"prediction": "12", "references": ["13"]}
    assert anls(**at_half) == 0.5
    assert anls(**at_half, strict_threshold=True) == 0
    assert anls(prediction="abcd", references=["abxy", "abce"], strict_threshold=True) == 0.75
    assert anls(**at_half, threshold=0.6) == 0
    assert metric("anls", strict_threshold=True).score(**at_half) == 0


def test_anls_divides_by_the_length_before_cleaning() -> None:
    assert anls(prediction="ab  xd   ", references=["ab cd"]) == pytest.approx(1 - 1 / 9)
    assert anls(prediction="ab xd", references=["ab cd"]) == pytest.approx(1 - 1 / 5)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("105", "100", True),
        ("105.01", "100", False),
        ("100", "105", True),
        ("95", "100", True),
        ("100", "95", False),  # relative to the target
        ("0.63", "63%", True),
        ("63", "63%", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("1,234", "1234", False),
        ("inf", "inf", False),
        ("nan", "nan", False),
        ("YES", "yes", True),
        ("Yes.", "Yes", False),
    ],
)
def test_relaxed_match(prediction: str, target: str, right: bool) -> None:
    assert relaxed_match(prediction=prediction, target=target) is right


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [("2008", "2010", False), ("2010.0", "2010", True), ("1850", "1899", True), ("2010%", "20.1", True)],
)
def test_years_have_no_tolerance_where_asked(prediction: str, target: str, right: bool) -> None:
    assert relaxed_match(prediction=prediction, target=target)
    assert relaxed_match(prediction=prediction, target=target, strict_year=True) is right
    assert metric("relaxed_strict_year").score(prediction=prediction, references=[target]) == right


def test_relaxed_match_cannot_be_called_with_its_arguments_swapped() -> None:
    with pytest.raises(TypeError):
        relaxed_match("95", "100")  # type: ignore[misc]


def test_any_reference_counts() -> None:
    assert relaxed_accuracy(prediction="7", references=["seven", "7.1"]) == 1
    assert exact_match(prediction="page 2", references=["2", "Page  2"]) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("  Red ", "red", 1),
        ("new\n york", "New York", 1),
        ("$5,000", "5000", 0),
        ("the cat", "cat", 0),
        ("yes.", "yes", 0),
        ("", "", 1),
        ("", "red", 0),
    ],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction=prediction, references=[reference]) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The red triangle.", "red triangle", 1),
        ("Two", "2", 1),
        ("none", "0", 1),
        ("top-left", "top left", 1),
        ("left, upper", "top left", 1),
        ("Middle", "centre", 1),
        ("center right", "centre right", 1),
        ("top", "top centre", 0),
        ("A", "A", 1),
        ("", "A", 0),
        ("the", "A", 0),
        ("letter", "letter A", 0),
        ("triangle red", "red triangle", 0),
    ],
)
def test_entity_match(prediction: str, reference: str, score: float) -> None:
    assert entity_match(prediction=prediction, references=[reference]) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("7 0 3", "7 0 3", 1),
        ("7 3 0", "7 0 3", 1 / 3),  # a place counts, unlike in token F1
        ("7 0", "7 0 3", 2 / 3),
        ("7 0 3 9", "7 0 3", 3 / 4),
        ("0   3", "7 0 3", 2 / 3),  # what is left out does not shift the rest
        ("Red  blue", "red blue", 1),
        ("", "red blue", 0),
        ("", "", 0),
    ],
)
def test_word_accuracy(prediction: str, reference: str, score: float) -> None:
    assert word_accuracy(prediction=prediction, references=[reference]) == pytest.approx(score)
    assert word_accuracy(prediction=prediction, references=["- - - - -", reference]) == pytest.approx(score)


def test_the_target_is_what_target_match_reads() -> None:
    assert metric("target_match").reference == "target"
    assert {metric(name).reference for name in TEXT_METRICS if name != "target_match"} == {"answers"}


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_sample_without_references_has_no_score(name: str) -> None:
    """Averages leave such a sample out; 0 would count it as wrong."""
    scores = [metric(m).score(prediction="red", references=[]) for m in (name, f"{name}_clean")]
    assert scores == [None, None]
    assert metric(name).score(prediction="red", references=["red"] * 10) == 1


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


def test_references_are_cleaned_alike() -> None:
    """Else the very text of a reference would be wrong."""
    for name in ("exact_match", "anls", "relaxed_accuracy"):
        for reference in ("$5,000", "1,234", '"yes".'):
            assert metric(f"{name}_clean").score(prediction=reference, references=[reference]) == 1
    assert metric("relaxed_accuracy").score(prediction="1,234", references=["1234"]) == 0
    assert metric("relaxed_accuracy_clean").score(prediction="1,234", references=["1234"]) == 1
    assert metric("relaxed_accuracy_clean").score(prediction="63", references=["63%"]) == 0
