"""Answer metrics and token recall, by name.

The suffix "_clean" gives the same metric of cleaned answers: "anls_clean" beside "anls".
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from experiments.errors import instead
from experiments.metrics.answer_metric import AnswerMetric, EvalMetric, TextMetric
from experiments.metrics.cider_d import CiderD, cider_d
from experiments.metrics.recall import EntityRecall, entity_recall
from experiments.metrics.text import (
    Anls,
    EntityMatch,
    ExactMatch,
    RelaxedAccuracy,
    SquadExactMatch,
    TargetMatch,
    TokenF1,
    WordAccuracy,
    anls,
    entity_match,
    exact_match,
    relaxed_accuracy,
    word_accuracy,
)
from experiments.metrics.vqa import VqaAccuracy, vqa_accuracy
from shirg import UserError

CLEAN = "_clean"
METRICS: dict[str, Callable[..., EvalMetric]] = {
    "anls": Anls,
    "cider_d": CiderD,
    "entity_match": EntityMatch,
    "entity_recall": EntityRecall,
    "exact_match": ExactMatch,
    "relaxed_accuracy": RelaxedAccuracy,
    "relaxed_strict_year": partial(RelaxedAccuracy, strict_year=True),
    "squad_exact_match": SquadExactMatch,
    "target_match": TargetMatch,
    "textvqa_accuracy": partial(VqaAccuracy, rules="textvqa"),
    "token_f1": TokenF1,
    "vqa_accuracy": VqaAccuracy,
    "word_accuracy": WordAccuracy,
}
"""Constructors by name; those of metrics that read answers take `clean`."""


def metric(name: str, **options: Any) -> EvalMetric:
    """The metric of that name."""
    base = name.removesuffix(CLEAN)
    if base not in METRICS or (base != name and base == "entity_recall"):
        known = f"choose from {', '.join(METRICS)}, or one of them with the suffix {CLEAN}"
        raise UserError(f"metric {name!r} does not exist{instead(base, METRICS, known)}")
    return METRICS[base](**options, **({"clean": True} if base != name else {}))


__all__ = [
    "CLEAN",
    "METRICS",
    "Anls",
    "AnswerMetric",
    "CiderD",
    "EntityMatch",
    "EntityRecall",
    "EvalMetric",
    "ExactMatch",
    "RelaxedAccuracy",
    "SquadExactMatch",
    "TargetMatch",
    "TextMetric",
    "TokenF1",
    "VqaAccuracy",
    "WordAccuracy",
    "anls",
    "cider_d",
    "entity_match",
    "entity_recall",
    "exact_match",
    "metric",
    "relaxed_accuracy",
    "vqa_accuracy",
    "word_accuracy",
]
