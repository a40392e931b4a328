"""Position bias on EntityGrid: how much accuracy is lost where the picture is cut into views.

Discrepancy 1 is the accuracy at the centres of slices minus that on their edges; discrepancy 2 is the accuracy at the
centres minus that where four slices meet. Both are small for a model that sees nothing, so they are reported beside the
accuracies. The same entity is shown at every place: differences are paired by entity, and entities are resampled.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from torchmetrics.functional.classification import multiclass_f1_score

from experiments.analysis.stats import estimate, paired_delta
from experiments.metrics.text import entity_form

CENTRE = "centre"
DISCREPANCIES = {"disc1": "edge", "disc2": "junction"}
COUNTING = "counting"


class PlacedAnswer(NamedTuple):
    """What is in memory of a row: 200 bytes, where its dict takes 830. Rows share the texts that are equal."""

    place: str
    subtask: str
    entity: str
    score: float
    recall: float | None
    guess: int | None
    """The number that was answered to a question of how many, and the right one; None and 0 for other questions."""
    truth: int


def probe(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Accuracy and recall by place, discrepancies in all and by task, and how often too many were counted.

    None for rows without places.
    """
    placed = list(_placed(rows, metric))
    if not placed:
        return None
    tasks = {"all": placed} | _split(placed, "subtask")
    counting = tasks.get(COUNTING, [])
    return {
        "accuracy": {
            task: {
                place: asdict(estimate([one.score for one in there], [one.entity for one in there]))
                for place, there in _split(part, "place").items()
            }
            for task, part in tasks.items()
        },
        **{
            name: {task: _discrepancy(part, place) for task, part in tasks.items()}
            for name, place in DISCREPANCIES.items()
        },
        "recall": {
            place: sum(known) / len(known)
            for place, there in _split(placed, "place").items()
            if (known := [one.recall for one in there if one.recall is not None])
        },
        "overcount": {
            place: sum(map(_too_many, there)) / len(there) for place, there in _split(counting, "place").items()
        },
        "counting_macro_f1": _macro_f1(counting) if counting else None,
    }


def _placed(rows: Iterable[Mapping[str, Any]], metric: str) -> Iterator[PlacedAnswer]:
    for row in rows:
        if row.get("place") and (score := row["scores"][metric]) is not None:
            place, subtask, entity = (sys.intern(row[name]) for name in ("place", "subtask", "entity"))
            counted = subtask == COUNTING
            guess, truth = (_number(row["prediction"]), int(row["answers"][0])) if counted else (None, 0)
            yield PlacedAnswer(place, subtask, entity, score, row["recall"], guess, truth)


def _split(rows: Sequence[PlacedAnswer], key: Literal["subtask", "place", "entity"]) -> dict[str, list[PlacedAnswer]]:
    parts: dict[str, list[PlacedAnswer]] = defaultdict(list)
    for row in rows:
        parts[getattr(row, key)].append(row)
    return dict(parts)


def _discrepancy(rows: Sequence[PlacedAnswer], place: str) -> dict[str, Any] | None:
    """Mean over entities of the accuracy at centres minus that at the place; None where either is missing."""
    by_entity = [_split(part, "place") for part in _split(rows, "entity").values()]
    pairs = [
        [sum(row.score for row in part[where]) / len(part[where]) for where in (CENTRE, place)]
        for part in by_entity
        if CENTRE in part and place in part
    ]
    if not pairs:
        return None
    centre, there = zip(*pairs, strict=True)
    lost = paired_delta(*({str(i): score for i, score in enumerate(scores)} for scores in (centre, there)))
    assert lost is not None
    return asdict(lost) | {"relative": lost.mean / (sum(centre) / len(centre)) if sum(centre) else None}


def _number(text: str) -> int | None:
    form = entity_form(text)
    return int(form) if form.isdecimal() else None


def _too_many(row: PlacedAnswer) -> bool:
    return row.guess is not None and row.guess > row.truth


def _macro_f1(rows: Sequence[PlacedAnswer]) -> float:
    """Macro F1 over the numbers that are the right answer of a row; every other answer counts as one extra class."""
    numbers = sorted({row.truth for row in rows})
    guesses = torch.tensor([_class_of(numbers, row.guess) for row in rows])
    truths = torch.tensor([_class_of(numbers, row.truth) for row in rows])
    scores = multiclass_f1_score(guesses, truths, num_classes=len(numbers) + 1, average="none")
    return float(scores[: len(numbers)].mean())


def _class_of(numbers: Sequence[int], number: int | None) -> int:
    return numbers.index(number) if number in numbers else len(numbers)
