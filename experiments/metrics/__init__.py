"""Answer metrics and token recall; each scores one sample by a pure function and averages as a torchmetrics module."""

from typing import Any

from experiments.metrics.anls import Anls, anls
from experiments.metrics.exact_match import ExactMatch, exact_match
from experiments.metrics.mean import SampleMean, TextMetric
from experiments.metrics.recall import EntityRecall, entity_recall
from experiments.metrics.relaxed_accuracy import RelaxedAccuracy, relaxed_accuracy

METRICS: dict[str, type[SampleMean]] = {
    "anls": Anls,
    "entity_recall": EntityRecall,
    "exact_match": ExactMatch,
    "relaxed_accuracy": RelaxedAccuracy,
}


def metric(name: str, **options: Any) -> SampleMean:
    """A fresh metric by name."""
    if name not in METRICS:
        raise ValueError(f"metric {name!r} does not exist: choose from {', '.join(METRICS)}")
    return METRICS[name](**options)


__all__ = [
    "METRICS",
    "Anls",
    "EntityRecall",
    "ExactMatch",
    "RelaxedAccuracy",
    "SampleMean",
    "TextMetric",
    "anls",
    "entity_recall",
    "exact_match",
    "metric",
    "relaxed_accuracy",
]
