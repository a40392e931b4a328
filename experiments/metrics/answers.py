"""From answers to scores: single answers as soon as they are there, corpus metrics when all are there."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from experiments.metrics import CLEAN, METRICS, AnswerMetric, CiderD, TextMetric, metric
from experiments.metrics.answer_metric import CLEANER
from experiments.metrics.cider_d import TOKENISER
from experiments.metrics.text import SYNONYMS
from experiments.metrics.vqa import tables
from shirg import UserError

Scorer = TextMetric | CiderD

_PROBES = (
    ("", ["", "a", "the", "..."]),
    ("a red cat", ["the red cat", "red cat.", "A Red  Cat", "a red cat"]),
    ("The answer is $1,000.", ["1000", "1,000", "$1000", "1000.00"]),
    ('"Yes."', ["yes", "Yes", "yes.", "YES"]),
    ("answer: “blue”", ["blue", "blue", "green", "navy blue"]),
    ("104", ["100", "103.9", "105", "99"]),
    ("106", ["100", "101", "111.3", "112"]),
    ("2011", ["2010", "2010.0", "1900", "2100"]),
    ("63%", ["0.63", "63", "63 %", "0.66"]),
    ("0", ["0", "0.0", "none", "zero"]),
    ("two dogs' don't", ["2 dogs dont", "two dogs do not", "two dogs' don't", "2 dogs"]),
    ("it's, well: 1.5/2;", ["it's well 1.5 2", "its well 1.52", "it 's well: 1.5/2", "it's, well: 1.5/2;"]),
    ("upper middle", ["top centre", "centre top", "top center", "upper"]),
    ("lower left disc", ["bottom left circle", "bottom circle", "left bottom disk", "disc"]),
    ("a grey rhombus plus", ["gray diamond cross", "grey diamond", "diamond", "gray cross"]),
    ("12", ["13", "21", "1", "123"]),
    ("abcd", ["abxy", "abce", "bcde", "xyz"]),
    ("(2010-2015) €5 #1", ["2010-2015 €5 #1", "2010-2015", "€5", "#1"]),
    ("naïve café", ["naive cafe", "naïve café", "NAÏVE CAFÉ", "café"]),
    ("one two three four five six", ["one two three four", "two three four five six", "1 2 3 4 5 6", "six"]),
)
"""Answers with four references each, which together reach the rules of all metrics."""


def text_metrics(names: Sequence[str]) -> dict[str, Scorer]:
    """The metrics among `names` that score answers, headline first; token metrics are computed from the selections."""
    scorers = {name: m for name in names if isinstance(m := metric(name), TextMetric | CiderD)}
    if not scorers:
        raise UserError(f"data.metrics={list(names)} scores no answers: name a text metric, for example exact_match")
    headline = next(iter(scorers))
    if isinstance(scorers[headline], CiderD):
        raise UserError(f"data.metrics: {headline} depends on all answers; put a metric of single answers first")
    return scorers


def score_answer(
    scorers: Mapping[str, Scorer], prediction: str, answers: Sequence[str], target: str
) -> dict[str, float | None]:
    """Scores by metric; None without references, and for now where the score depends on all answers."""
    return {
        name: m.score(prediction=prediction, references=references(m, answers, target))
        if isinstance(m, TextMetric)
        else None
        for name, m in scorers.items()
    }


def score_together(
    predictions: Iterable[str], references: Iterable[Sequence[str]], scorers: Mapping[str, Scorer]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """The scores that depend on all answers, NaN for a sample without references, and the facts of each such metric.

    Args:
        predictions, references: those of all samples; they are read several times.
    """
    together = {name: m for name, m in scorers.items() if isinstance(m, CiderD)}
    scores = {name: np.fromiter(_or_nan(m.scores(predictions, references)), float) for name, m in together.items()}
    return scores, {name: m.facts(predictions, references) for name, m in together.items()}


def _or_nan(scores: Iterable[float | None]) -> Iterator[float]:
    return (math.nan if score is None else score for score in scores)


def references(scorer: AnswerMetric, answers: Sequence[str], target: str) -> Sequence[str]:
    """What a metric compares with: the accepted answers, or the target alone."""
    if scorer.reference == "answers":
        return answers
    return (target,) if target else ()


@cache
def scorer_version() -> str:
    """Version of the scores: 16 hex digits that change when a metric scores one of some fixed answers differently.

    Comments, names and the layout of the code do not matter. A change that none of the probes shows needs a new probe.
    """
    predictions, accepted = zip(*_PROBES, strict=True)
    single = [(prediction, [reference] * 4) for prediction, given in _PROBES for reference in given]
    scores: dict[str, list[float | None]] = {}
    for name in [base + suffix for base in METRICS for suffix in ("", CLEAN) if base != "entity_recall"]:
        scorer = metric(name)
        if isinstance(scorer, CiderD):
            scores[name] = scorer.scores(predictions, accepted)
        elif isinstance(scorer, TextMetric):
            scores[name] = [scorer.score(prediction=p, references=r) for p, r in [*_PROBES, *single]]
    rounded = {name: [f"{score:.6f}" for score in values if score is not None] for name, values in scores.items()}
    behaviour = [CLEANER, TOKENISER, tables(), SYNONYMS, rounded]
    return hashlib.sha256(json.dumps(behaviour, sort_keys=True).encode()).hexdigest()[:16]
