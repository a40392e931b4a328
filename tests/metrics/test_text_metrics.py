"""Answer metrics: golden numbers of the reference implementations, edges by hand, and one mean for all ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from experiments.metrics import CiderD, TextMetric, anls, entity_match, exact_match, metric, relaxed_accuracy
from experiments.metrics.text import relaxed_match

MEANS = [
    *("anls", "entity_match", "exact_match", "relaxed_accuracy", "relaxed_strict_year"),
    *("squad_exact_match", "target_match", "textvqa_accuracy", "token_f1", "vqa_accuracy"),
]


def ids(n: int) -> list[str]:
    return [f"s{i}" for i in range(n)]


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


def test_soft_accuracy_wants_people_enough_to_reach_1() -> None:
    with pytest.raises(ValueError, match="needs the answers of 4 or more people, and a sample has 3"):
        metric("vqa_accuracy").score(prediction="a", references=["a"] * 3)
    assert metric("vqa_accuracy", few=True).score(prediction="a", references=["a"] * 3) == pytest.approx(2 / 3)
    by_matches = [
        metric("vqa_accuracy").score(prediction="red", references=["red"] * k + [str(i) for i in range(10 - k)])
        for k in range(5)
    ]
    assert by_matches == pytest.approx([0, 0.3, 0.6, 0.9, 1])


def test_textvqa_has_a_normaliser_of_its_own() -> None:
    one_comma = {"prediction": "1,000", "references": ["1000"] * 10}
    assert metric("textvqa_accuracy").score(**one_comma) == 1
    possessive = {"prediction": "dog's", "references": ["dog 's"] * 10}
    assert (metric("textvqa_accuracy").score(**possessive), metric("vqa_accuracy").score(**possessive)) == (1, 0)


def test_the_target_is_what_target_match_reads() -> None:
    assert metric("target_match").reference == "target"
    assert {metric(name).reference for name in MEANS if name != "target_match"} == {"answers"}


@pytest.mark.parametrize("name", [*MEANS, "anls_clean"])
def test_a_sample_without_references_is_left_out(name: str) -> None:
    scorer = metric(name)
    scorer.update(["red", "blue", "x"], [["red"] * 10, [], ["aaaa"] * 10], ids(3))
    assert float(scorer.compute()) == 0.5


@pytest.mark.parametrize("name", MEANS)
def test_nothing_scored_is_not_zero(name: str) -> None:
    scorer = metric(name)
    scorer.update(["blue"], [[]], ["s"])
    assert math.isnan(float(scorer.compute()))


@pytest.mark.parametrize("name", [*MEANS, "cider_d"])
def test_predictions_and_references_must_pair_up(name: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        metric(name).update(["a", "b"], [["a"] * 4], ["s"])


def test_the_mean_stays_exact_over_many_samples() -> None:
    scorer = metric("exact_match")
    for turn in range(3):
        names = [f"{turn}-{i}" for i in range(1000)]
        scorer.update(["a"] * 1000, [["a"]] * 900 + [["b"]] * 100, names)
    assert scorer.compute().dtype == torch.float64
    assert float(scorer.compute()) == 0.9
    scorer.reset()
    scorer.update(["a"], [["b"]], ["s"])
    assert float(scorer.compute()) == 0


def test_a_sample_counts_once_however_often_it_is_scored() -> None:
    scorer = metric("exact_match")
    scorer.update(["a", "b"], [["a"], ["a"]], ["s0", "s1"])
    scorer.update(["a"], [["a"]], ["s0"])
    assert float(scorer.compute()) == 0.5


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"metric 'bleu' does not exist: choose from anls, cider_d, entity_match"):
        metric("bleu")
    with pytest.raises(ValueError, match="metric 'entity_recall_clean' does not exist"):
        metric("entity_recall_clean")


SAMPLES = [("s0", "a red cat", ["a red cat"]), ("s1", "blue dog", ["a blue dog"]), ("s2", "no", ["yes"])]


def _rank(rank: int, shares: list[list[int]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for case, share in enumerate(shares[rank : len(shares) : 2]):
        for name in ("exact_match", "anls", "cider_d"):
            scorer = metric(name)
            if share:
                names, predictions, references = zip(*(SAMPLES[i] for i in share), strict=True)
                scorer.update(predictions, references, names)
            value = scorer.compute()
            got = {k: float(v) for k, v in value.items()} if isinstance(scorer, CiderD) else float(value)
            found[f"{case} {name}"] = got
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_processes_see_every_sample_once(tmp_path: Path) -> None:
    """A sampler that pads gives both ranks the same sample, and a rank may be left with nothing."""
    shares = [[0, 1], [2, 0], [0, 1, 2], []]
    mp.spawn(_rank, args=(shares, str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    names, predictions, references = zip(*SAMPLES, strict=True)
    for name in ("exact_match", "anls", "cider_d"):
        alone = metric(name)
        alone.update(predictions, references, names)
        value = alone.compute()
        expected = {k: float(v) for k, v in value.items()} if name == "cider_d" else float(value)
        assert ranks[0][f"0 {name}"] == pytest.approx(expected)
        assert ranks[0][f"1 {name}"] == pytest.approx(expected)
    assert isinstance(metric("anls"), TextMetric)
