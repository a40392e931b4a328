"""From answers to scores: each answer by itself at once, and what needs the whole set when all are there."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments import metrics
from experiments.metrics import CiderD, TextMetric, metric
from shirg import UserError

Scorer = TextMetric | CiderD
Row = dict[str, Any]


def text_metrics(names: Sequence[str]) -> dict[str, Scorer]:
    """The metrics that score answers, headline first; token metrics are computed from the selections instead."""
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
    """Scores by metric; None where there is nothing to compare with, and for now where all answers are needed."""
    return {
        name: m.score(prediction=prediction, references=references(m, answers, target))
        if isinstance(m, TextMetric)
        else None
        for name, m in scorers.items()
    }


def score_together(rows: Sequence[Row], scorers: Mapping[str, Scorer]) -> dict[str, dict[str, Any]]:
    """Puts the scores that depend on all rows into the rows; returns what such scores must be read with, by metric."""
    facts = {}
    for name, m in scorers.items():
        if isinstance(m, TextMetric):
            continue
        texts = [row["prediction"] for row in rows], [row["answers"] for row in rows]
        for row, score in zip(rows, m.scores(*texts), strict=True):
            row["scores"][name] = score
        facts[name] = m.facts(*texts)
    return facts


def references(scorer: TextMetric, answers: Sequence[str], target: str) -> Sequence[str]:
    """What a metric compares with: the accepted answers, or the target alone."""
    if scorer.reference == "answers":
        return answers
    return (target,) if target else ()


@cache
def scorer_version() -> str:
    """Which code scores: 16 hex digits of the sources of `experiments.metrics`."""
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(metrics.__path__[0]).iterdir() if path.suffix in (".py", ".json")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
