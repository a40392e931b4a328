"""Every golden case of tests/golden/metrics, or of the folder that --golden names; a file it lacks is skipped.

Any folder of that form will do: the numbers of the references are in the files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.metrics import anls, cider_d, metric, relaxed_accuracy, vqa_accuracy
from experiments.metrics.cider_d import tokenise
from experiments.metrics.text import squad_score
from experiments.metrics.vqa import normalise, normalise_words, tables
from tests.golden_data import golden_dir

Read = Callable[[str], dict[str, Any]]
NOT_PENN = {
    "ptb-dev-002": "clitic",
    "ptb-dev-003": "clitic",
    "ptb-dev-005": "last period of an abbreviation",
    "ptb-dev-011": "bracket",
    "ptb-dev-012": "bracket",
    "ptb-dev-019": "clitic",
    "ptb-dev-020": "clitic",
    "ptb-dev-028": "last period of an abbreviation",
    "ptb-dev-029": "clitic and abbreviation",
    "ptb-dev-032": "the euro is no dollar",
}
"""Where our tokeniser departs from the Penn Treebank's, and why."""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden") or golden_dir("metrics")


@pytest.fixture
def golden(folder: Path) -> Read:
    def read(name: str) -> dict[str, Any]:
        path = folder / f"{name}.json"
        if not path.exists():
            pytest.skip(f"{folder} has no {path.name}")
        return json.loads(path.read_text(encoding="utf-8"))

    return read


def test_the_folder_has_golden_numbers(folder: Path) -> None:
    known = {"anls", "cider_d", "relaxed_accuracy", "squad_em_f1", "vqa_normalization", "vqa_soft_accuracy"}
    assert known & {path.stem for path in folder.glob("*.json")}, f"{folder} has none of {sorted(known)}"


@pytest.mark.parametrize(
    ("name", "score"), [("relaxed_accuracy", relaxed_accuracy), ("anls", anls), ("vqa_soft_accuracy", vqa_accuracy)]
)
def test_scores(golden: Read, name: str, score: Callable[..., float]) -> None:
    data = golden(name)
    for case in data["cases"]:
        got = score(prediction=case["prediction"], references=case["references"])
        assert got == pytest.approx(case["expected"], abs=1e-8), case


@pytest.mark.parametrize("kind", ["f1", "em"])
def test_token_f1_and_exact_match_of_squad(golden: Read, kind: str) -> None:
    for case in golden("squad_em_f1")["cases"]:
        fields = {"prediction": case["prediction"], "references": case["references"]}
        got = squad_score(**fields, kind="f1" if kind == "f1" else "exact_match")
        assert got == pytest.approx(case[f"expected_{kind}"], abs=1e-6), case


@pytest.mark.parametrize(
    ("name", "file", "mean", "options"),
    [
        ("relaxed_accuracy", "relaxed_accuracy", "mean", {}),
        ("anls", "anls", "mean", {}),
        ("vqa_accuracy", "vqa_soft_accuracy", "mean", {"few": True}),
        ("token_f1", "squad_em_f1", "mean_f1", {}),
        ("squad_exact_match", "squad_em_f1", "mean_em", {}),
    ],
)
def test_the_metric_of_that_name_has_the_golden_mean(
    golden: Read, name: str, file: str, mean: str, options: dict[str, Any]
) -> None:
    data = golden(file)
    scorer = metric(name, **options)
    scores = [scorer.score(prediction=c["prediction"], references=c["references"]) for c in data["cases"]]
    scored = [score for score in scores if score is not None]
    if mean in data:
        assert sum(scored) / len(scored) == pytest.approx(data[mean], abs=1e-7)


def test_normalisers(golden: Read) -> None:
    for case in golden("vqa_normalization")["cases"]:
        assert normalise(case["input"]) == case["expected"], case
        if "expected_call" in case:
            assert normalise_words(case["input"]) == case["expected_call"], case


def test_tables_of_the_normaliser(golden: Read) -> None:
    theirs = golden("vqa_tables")
    ours = tables()
    for name in ("contractions", "number_words", "articles", "punctuation"):
        assert ours[name] == theirs[name], name
    assert len(ours["contractions"]) == 120


def test_cider_d_of_items_and_corpora(golden: Read) -> None:
    for corpus in golden("cider_d")["corpora"]:
        items = [(i["prediction"].split(), [r.split() for r in i["references"]]) for i in corpus["items"]]
        scores = cider_d(items)
        for item, score in zip(corpus["items"], scores, strict=True):
            assert score == pytest.approx(item["expected"], abs=1e-8), item
        assert sum(scores) / len(scores) == pytest.approx(corpus["expected_corpus"], abs=1e-8), corpus["name"]


def test_the_tokeniser_departs_from_penn_treebank_where_it_says(golden: Read, folder: Path) -> None:
    cases = golden("ptb_tokenization")["cases"]
    for case in cases:
        tokens = tokenise(case["input"])
        assert tokenise(" ".join(tokens)) == tokens, case
        assert all(token == token.lower() and not token.isspace() for token in tokens), case
    if folder == golden_dir("metrics"):
        assert {c["id"] for c in cases if " ".join(tokenise(c["input"])) != c["expected"]} == set(NOT_PENN)
