"""The version of the scores: it changes when a metric scores differently, and for no other reason."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import experiments
from experiments.metrics import CiderD, answer_metric, answers, metric, text, vqa
from experiments.metrics.answers import score_answer, score_together, scorer_version, text_metrics

VERSION = "56d663511ccaebe1"
"""When this fails, scores differ from those of earlier results. If that is intended, write the new version here."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    scorer_version.cache_clear()
    yield
    scorer_version.cache_clear()


def test_the_version_of_today() -> None:
    assert scorer_version() == VERSION


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (text, "TOLERANCE", 0.06),
        (text, "YEARS", range(0)),
        (text, "PLACES", frozenset()),
        (answers, "SYNONYMS", {"big": "large"}),
        (text, "fold_case", str.strip),
        (text.Levenshtein, "distance", lambda a, b: float(a != b)),
        (vqa, "_PERIODS", 1),
        (answers, "tables", lambda: {"articles": []}),
        (sys.modules[CiderD.__module__], "SIGMA", 5.0),
        (answer_metric, "_LEAD", answer_metric._CURRENCY),
        (answer_metric, "_THOUSANDS", answer_metric._LEAD),
        (answers, "CLEANER", "clean_answer/2"),
    ],
)
def test_another_behaviour_is_another_version(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: object
) -> None:
    monkeypatch.setattr(owner, name, value)
    assert scorer_version() != VERSION


def test_a_comment_is_not_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(experiments.__path__[0]) / "metrics", tmp_path / "metrics")
    for file in (tmp_path / "metrics").glob("*.py"):
        file.write_text("# Another comment.\n" + file.read_text())
    monkeypatch.setattr(experiments, "__path__", [str(tmp_path), *experiments.__path__])
    for module in [name for name in sys.modules if name.startswith("experiments.metrics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(experiments, "metrics", None)
    copied = importlib.import_module("experiments.metrics.answers")
    assert copied.__file__ is not None and Path(copied.__file__).is_relative_to(tmp_path)
    assert copied.scorer_version() == VERSION
    # What the import of the copy has put there goes too.
    for module in [name for name in sys.modules if name.startswith("experiments.metrics")]:
        monkeypatch.delitem(sys.modules, module)


def test_scores_of_single_answers_come_first_and_those_of_the_set_later() -> None:
    scorers = text_metrics(["exact_match", "entity_recall", "cider_d", "target_match"])
    assert list(scorers) == ["exact_match", "cider_d", "target_match"]
    rows = [
        {"prediction": p, "answers": [a], "scores": score_answer(scorers, p, [a], t)}
        for p, a, t in (("red", "red", ""), ("blue", "green", "blue"))
    ]
    assert rows[0]["scores"] == {"exact_match": 1, "cider_d": None, "target_match": None}
    texts = [row["prediction"] for row in rows], [row["answers"] for row in rows]
    scores, facts = score_together(*texts, scorers)
    assert list(scores) == ["cider_d"] and scores["cider_d"].tolist() == pytest.approx([2.5, 0])
    assert list(facts) == ["cider_d"] and facts["cider_d"]["score"] == pytest.approx(1.25)


def test_every_metric_says_whether_more_is_better() -> None:
    assert all(metric(name).higher_is_better for name in ("exact_match", "cider_d", "entity_recall"))
