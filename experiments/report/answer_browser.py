"""What the page's script shows of every answer: samples, and for each system which of a sample's answers it gave.

Systems give few different answers to one sample, so that the answers of 1,000 systems take two bytes each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row, our_row
from experiments.analysis.system_names import labels
from experiments.jobs.results import SAMPLES
from experiments.report.example_cards import ExampleCard, kind_of
from experiments.viz.examples import printable

MOST_SAMPLES = 2000
"""Samples in the predictions browser; all of them are in each job's samples.parquet."""
MOST_ANSWERS = 400_000
"""Answers of all systems together: with many systems there are fewer samples."""
LONGEST_PREDICTION = 300
RIGHT = 0.5
"""The lowest score of an answer that is called right."""
_FACTS = ["id", "question", "answers", "group", "density", "subtask"]

Answer = tuple[str, float | None]
"""A prediction and its score."""


def browser_data(study: Path, rows: Sequence[Row], cards: Sequence[ExampleCard]) -> dict[str, Any] | None:
    """The samples with their different answers, and for each system the number of its answer to each sample.

    -1 stands for a sample that a system has not answered. None without a finished system.
    """
    done = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if row["status"] == "ok"]
    if not done:
        return None
    samples = _samples(study, [row for row, _ in done])
    n_samples = max(1, min(MOST_SAMPLES, MOST_ANSWERS // len(done)))
    ids = list(samples)[:n_samples]
    answers: dict[str, dict[Answer, int]] = {i: {} for i in ids}
    systems = [{"label": label, "answers": _numbers(study, row, answers)} for row, label in done]
    card_numbers = {card.id: number for number, card in enumerate(cards)}
    first = next((i for i, (row, _) in enumerate(done) if row["selector"] == BASELINE), 0)
    ours = our_row(rows)
    second = next((i for i, (row, _) in enumerate(done) if row is ours and i != first), (first + 1) % len(done))
    return {
        "right": RIGHT,
        "of": len(samples),
        "first": first,
        "second": second,
        "samples": [{**samples[i], "card": card_numbers.get(i), "given": list(answers[i])} for i in ids],
        "systems": systems,
    }


def _samples(study: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What was asked, by id; read from one job of all that have the same samples."""
    samples: dict[str, dict[str, Any]] = {}
    jobs: dict[str, str] = {}
    for row in rows:
        jobs.setdefault(row["ids"], row["job"])
    for job in jobs.values():
        table = pq.read_table(study / job / SAMPLES, columns=_FACTS)
        for i, question, expected, *kind in zip(*table.to_pydict().values(), strict=True):
            samples.setdefault(i, {"id": i, "question": question, "answers": expected, "kind": kind_of(*kind)})
    return samples


def _numbers(study: Path, row: Row, answers: dict[str, dict[Answer, int]]) -> list[int]:
    """The number of the system's answer to each sample; new answers are added to `answers`."""
    names = ["id", "prediction", f"score_{row['metric']}"]
    table = pq.read_table(study / row["job"] / SAMPLES, columns=names)
    given = {i: answer for i, *answer in zip(*table.to_pydict().values(), strict=True) if i in answers}
    numbers = []
    for i, known in answers.items():
        if i in given:
            text, score = given[i]
            numbers.append(known.setdefault((printable(text, LONGEST_PREDICTION), score), len(known)))
        else:
            numbers.append(-1)
    return numbers
