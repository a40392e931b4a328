"""Position bias on EntityGrid: how much accuracy is lost where the picture is cut into views.

Discrepancy 1 is the accuracy at the centres of slices minus that on their edges; discrepancy 2 is the accuracy at the
centres minus that where four slices meet. Both are small for a model that sees nothing, so they are reported beside the
accuracies. The same entity is shown at every place: differences are paired by entity, and entities are resampled.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torchmetrics.functional.classification import multiclass_f1_score

from experiments.analysis.stats import estimate, paired_delta
from experiments.jobs.sample_rows import SampleRow
from experiments.metrics.text import entity_form

CENTRE = "centre"
DISCREPANCIES = {"disc1": "edge", "disc2": "junction"}
COUNTING = "counting"


def probe(rows: Sequence[SampleRow], metric: str) -> dict[str, Any] | None:
    """Accuracy and recall by place, discrepancies in all and by task, and how often too many were counted.

    None for rows without places.
    """
    placed = [row for row in rows if row.get("place") and row["scores"][metric] is not None]
    if not placed:
        return None
    tasks = {"all": placed} | _split(placed, "subtask")
    counting = tasks.get(COUNTING, [])
    return {
        "accuracy": {
            task: {
                place: asdict(estimate([_score(r, metric) for r in there], [r["entity"] for r in there]))
                for place, there in _split(part, "place").items()
            }
            for task, part in tasks.items()
        },
        **{
            name: {task: _discrepancy(part, metric, place) for task, part in tasks.items()}
            for name, place in DISCREPANCIES.items()
        },
        "recall": {
            place: sum(known) / len(known)
            for place, there in _split(placed, "place").items()
            if (known := [row["recall"] for row in there if row["recall"] is not None])
        },
        "overcount": {
            place: sum(map(_too_many, there)) / len(there) for place, there in _split(counting, "place").items()
        },
        "counting_macro_f1": _macro_f1(counting) if counting else None,
    }


def _split(rows: Sequence[SampleRow], key: Literal["subtask", "place", "entity"]) -> dict[str, list[SampleRow]]:
    parts: dict[str, list[SampleRow]] = defaultdict(list)
    for row in rows:
        parts[row[key]].append(row)
    return dict(parts)


def _discrepancy(rows: Sequence[SampleRow], metric: str, place: str) -> dict[str, Any] | None:
    """Mean over entities of the accuracy at centres minus that at the place; None where either is missing."""
    by_entity = [_split(part, "place") for part in _split(rows, "entity").values()]
    pairs = [
        [sum(_score(row, metric) for row in part[where]) / len(part[where]) for where in (CENTRE, place)]
        for part in by_entity
        if CENTRE in part and place in part
    ]
    if not pairs:
        return None
    centre, there = zip(*pairs, strict=True)
    lost = paired_delta(*({str(i): score for i, score in enumerate(scores)} for scores in (centre, there)))
    assert lost is not None
    return asdict(lost) | {"relative": lost.mean / (sum(centre) / len(centre)) if sum(centre) else None}


def _score(row: SampleRow, metric: str) -> float:
    score = row["scores"][metric]
    assert score is not None, "rows without a score are left out"
    return score


def _number(text: str) -> int | None:
    form = entity_form(text)
    return int(form) if form.isdecimal() else None


def _too_many(row: SampleRow) -> bool:
    guess = _number(row["prediction"])
    return guess is not None and guess > int(row["answers"][0])


def _macro_f1(rows: Sequence[SampleRow]) -> float:
    """Macro F1 over the numbers that are the right answer of a row; every other answer counts as one extra class."""
    numbers = sorted({int(row["answers"][0]) for row in rows})
    guesses = torch.tensor([_class_of(numbers, _number(row["prediction"])) for row in rows])
    truths = torch.tensor([_class_of(numbers, int(row["answers"][0])) for row in rows])
    scores = multiclass_f1_score(guesses, truths, num_classes=len(numbers) + 1, average="none")
    return float(scores[: len(numbers)].mean())


def _class_of(numbers: Sequence[int], number: int | None) -> int:
    return numbers.index(number) if number in numbers else len(numbers)
