"""Every answer of every system, side by side, for the page's sample browser."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.report.cards import RIGHT, ExampleCard, printable
from experiments.report.story import our_row
from experiments.study.compare import BASELINE
from experiments.study.layout import labels
from experiments.study.record import SAMPLES
from experiments.study.rows import Row

MOST = 2000
"""Samples on a page; all of them are in each job's samples.parquet."""
LONGEST = 300


def prediction_rows(study: Path, rows: Sequence[Row], shown: Sequence[ExampleCard]) -> dict[str, Any] | None:
    """Plain data for the page's script: samples, and per system answers and scores in the samples' order."""
    done = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if row["status"] == "ok"]
    if not done:
        return None
    samples: dict[str, dict[str, Any]] = {}
    said: list[dict[str, tuple[str, float | None]]] = []
    for row, _ in done:
        columns = ["id", "question", "answers", "group", "density", "subtask", "prediction", f"score_{row['metric']}"]
        table = pq.read_table(study / row["job"] / SAMPLES, columns=columns)
        of_row = {}
        for i, question, expected, group, density, subtask, prediction, score in zip(
            *table.to_pydict().values(), strict=True
        ):
            kind = " ".join(filter(None, (group, density, subtask)))
            sample = {"id": i, "question": question, "answers": expected, "kind": kind}
            samples.setdefault(i, sample)
            of_row[i] = (printable(prediction, LONGEST), score)
        said.append(of_row)
    ids = list(samples)[:MOST]
    cards = {card.id: number for number, card in enumerate(shown)}
    first = next((i for i, (row, _) in enumerate(done) if row["selector"] == BASELINE), 0)
    ours = our_row(rows)
    second = next((i for i, (row, _) in enumerate(done) if row is ours and i != first), (first + 1) % len(done))
    return {
        "right": RIGHT,
        "of": len(samples),
        "first": first,
        "second": second,
        "samples": [{**samples[i], "card": cards.get(i)} for i in ids],
        "systems": [
            {"label": label, "said": [of_row.get(i, (None, None)) for i in ids]}
            for (_, label), of_row in zip(done, said, strict=True)
        ],
    }
