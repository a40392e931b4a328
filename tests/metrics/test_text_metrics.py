"""Answer metrics against golden numbers of the reference implementations."""

import json
import math
from typing import Any

import pytest
import torch

from experiments.metrics import METRICS, TextMetric, anls, exact_match, metric, relaxed_accuracy
from experiments.metrics.relaxed_accuracy import relaxed_match
from tests.golden_data import golden_dir

TEXT_METRICS = sorted(name for name, kind in METRICS.items() if issubclass(kind, TextMetric))


def golden(name: str) -> dict[str, Any]:
    return json.loads((golden_dir("metrics") / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["relaxed_accuracy", "anls"])
def test_every_golden_case(name: str) -> None:
    scorer = metric(name)
    assert isinstance(scorer, TextMetric)
    cases = golden(name)["cases"]
    assert len(cases) > 90
    for case in cases:
        got = scorer.score(prediction=case["prediction"], references=case["references"])
        assert got == pytest.approx(case["expected"], abs=1e-8), case


@pytest.mark.parametrize("name", ["relaxed_accuracy", "anls"])
def test_the_mean_of_two_ranks_is_the_golden_mean(name: str) -> None:
    data = golden(name)
    halves = [data["cases"][0::2], data["cases"][1::2]]
    ranks = [metric(name) for _ in halves]
    for rank, cases in zip(ranks, halves, strict=True):
        rank.update([c["prediction"] for c in cases], [c["references"] for c in cases])
    ranks[0].merge_state(ranks[1])
    assert float(ranks[0].compute()) == pytest.approx(data["mean"], abs=1e-12)


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


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_sample_without_references_is_left_out(name: str) -> None:
    scorer = metric(name)
    scorer.update(["red", "blue", "x"], [["red"], [], ["aaaa"]])
    assert float(scorer.compute()) == 0.5


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_nothing_scored_is_not_zero(name: str) -> None:
    scorer = metric(name)
    scorer.update(["blue"], [[]])
    assert math.isnan(float(scorer.compute()))


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_predictions_and_references_must_pair_up(name: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        metric(name).update(["a", "b"], [["a"]])


def test_the_mean_stays_exact_over_many_samples() -> None:
    scorer = metric("exact_match")
    for _ in range(3):
        scorer.update(["a"] * 1000, [["a"]] * 900 + [["b"]] * 100)
    assert scorer.compute().dtype == torch.float64
    assert float(scorer.compute()) == 0.9
    scorer.reset()
    scorer.update(["a"], [["b"]])
    assert float(scorer.compute()) == 0


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"metric 'bleu' does not exist: choose from anls, entity_recall, exact_match"):
        metric("bleu")
