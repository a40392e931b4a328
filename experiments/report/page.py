"""report.html: one page with the study's tables, figures, examples, every answer, commands and environment.

It is made of the jobs' own files alone; page.html is its template, page.css its style and page.js its script.
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.analysis.columns import columns, labels
from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row, our_row, unequal
from experiments.analysis.systems import Result
from experiments.analysis.table import comparable, legend, parts, records, refresh
from experiments.atomic_files import write_atomic
from experiments.jobs.results import SAMPLES, SHOTS, read_result
from experiments.viz.examples import ExampleRecord, load_examples, printable

if TYPE_CHECKING:
    from experiments.report.figure_style import ReportFigure

NAME = "report.html"
LAST_REFRESH = ".refresh_seconds"
"""How long the last refresh after a job took; the file's time says when it was."""
QUICK_REFRESH = 1.0
"""Seconds: what takes no longer is done after every job."""
OPEN_CARDS = 3
"""Examples that are shown at once; the others are shown on request."""
MOST_CARDS = 8
MOST_PICTURES = 120
"""Pictures on a page: with many systems there are fewer examples, so that the page still opens at once."""
MOST_SAMPLES = 2000
"""Samples in the predictions browser; all of them are in each job's samples.parquet."""
LONGEST_PREDICTION = 300
RIGHT = 0.5
"""The lowest score of an answer that is called right."""
_HERE = Path(__file__).parent


def refresh_report(study: Path) -> None:
    """Rebuilds the table files and the page, without figures and overlaps: what a job does at its end.

    In a large study this takes longer than a job. Nothing is done until nine times as long as the last time took has
    passed, so that refreshing is at most a tenth of a sweep; the command rebuilds everything at its end.
    """
    last = study / LAST_REFRESH
    if last.exists():
        seconds = float(last.read_text())
        if seconds > QUICK_REFRESH and time.time() - last.stat().st_mtime < 9 * seconds:
            return
    start = time.monotonic()
    frame = refresh(study, overlaps=False)
    if not frame.empty:
        write_report(study, frame)
    write_atomic(last, f"{time.monotonic() - start:.3f}\n")


def write_report(study: Path, frame: pd.DataFrame, figures: "Sequence[ReportFigure]" = ()) -> Path:
    """Writes the page from the jobs' own files; no dataset and no model is needed.

    Args:
        frame: the study's table.
        figures: none while the study is running; they take longer to draw than the rest.
    """
    path = study / NAME
    write_atomic(path, render(study, frame, figures))
    return path


def render(study: Path, frame: pd.DataFrame, figures: "Sequence[ReportFigure]" = ()) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = records(frame)
    results = [read_result(study / row["job"]) for row in rows]
    known = [result for result in results if result is not None]
    shown = columns(rows)
    cards = example_cards(study, rows)
    equal = [not unequal(row) for row in rows]
    indices = range(len(rows))
    groups = [(title, [i for i in indices if any(rows[i] is row for row in part)]) for title, part in parts(rows)]
    script = (_HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        study=study.name,
        columns=shown,
        rows=rows,
        labels=labels(rows),
        all_ok=all(row["status"] == "ok" for row in rows),
        open_cards=OPEN_CARDS,
        groups=groups,
        equal=equal,
        equal_first=not all(equal) and sum(equal) > 1,
        legend=legend(rows),
        best=[column.best(comparable(rows)) for column in shown],
        untrained=sorted({r["choices"]["model"] for r in known if r.get("model", {}).get("trained") is False}),
        synthetic=sorted({row["dataset"] for row in rows if (row["dataset"] or "").startswith("synth_")}),
        unfinished=[row for row in rows if row["status"] != "ok"],
        facts=_facts(known),
        figures=figures,
        cards=cards,
        right=RIGHT,
        has_targets=any(row.get("recall mean") is not None for row in rows),
        data=browser_data(study, rows, cards),
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup(script),
        digest=digest,
    )


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """What the rows have in common, and where they differ."""
    done = [result for result in results if result["status"] == "ok"]
    facts = []
    for title, describe in (
        ("model", _model),
        ("data", _data),
        ("machine", _machine),
        ("software", _software),
        ("commit", _commit),
    ):
        if done:
            facts.append((title, "; ".join(dict.fromkeys(map(describe, done)))))
    return [*facts, ("finished", max(r["times"]["finished"] for r in done))] if done else facts


def _model(result: Result) -> str:
    model, stored = result["model"], result["config"]["stored"]["model"]
    weights = f"weights {stored}" if stored else str(result["config"]["model"].get("path"))
    return f"{result['choices']['model']}, {model['parameters'] / 1e6:.3g} M parameters, {weights}"


def _data(result: Result) -> str:
    data = result["data"]
    return f"{data['name']}, {data['split']}: {data['n']} of {data['of']} samples"


def _machine(result: Result) -> str:
    env = result["environment"]
    return f"{env['device']}, {env['dtype']}, {env['threads']} thread{'' if env['threads'] == 1 else 's'}"


def _software(result: Result) -> str:
    env = result["environment"]
    return f"Python {env['python']}, torch {env['torch']}, transformers {env['transformers']}"


def _commit(result: Result) -> str:
    env = result["environment"]
    return (env["git"] or "unknown")[:12] + (" and local changes" if env["git_dirty"] else "")


@dataclass(frozen=True)
class SelectorView:
    """What one system kept of an example, and what it answered."""

    label: str
    image: str
    heat: str | None
    prediction: str
    score: float | None
    kept: str
    recall: float | None


@dataclass(frozen=True)
class ExampleCard:
    """One sample with the views of all systems; pictures are data URLs."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    picture: str
    views: tuple[SelectorView, ...]


def example_cards(study: Path, rows: Sequence[Row]) -> list[ExampleCard]:
    """The samples that most systems drew, in the order in which they were chosen."""
    found: dict[str, list[tuple[str, ExampleRecord]]] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        for example in load_examples(study / row["job"] / SHOTS):
            found.setdefault(example.record["id"], []).append((label, example))
    most = max(1, min(MOST_CARDS, MOST_PICTURES // (1 + len(rows))))
    common = sorted(found, key=lambda sample: (-len(found[sample]), list(found).index(sample)))[:most]
    return [_example_card(found[sample]) for sample in common]


def _example_card(examples: Sequence[tuple[str, ExampleRecord]]) -> ExampleCard:
    first = examples[0][1].record
    return ExampleCard(
        id=first["id"],
        question=first["question"],
        answers=tuple(first["answers"]),
        kind=_kind(first["group"], first["density"], first["subtask"]),
        picture=inline_jpeg(examples[0][1].picture),
        views=tuple(
            SelectorView(
                label=label,
                image=inline_jpeg(example.overlay),
                heat=None if example.heat is None else inline_jpeg(example.heat),
                prediction=printable(example.record["prediction"]),
                score=next(iter(example.record["scores"].values())),
                kept=f"{example.record['n_visual']} tokens"
                + "".join(f", {count} {source}" for source, count in example.record["sources"].items() if count),
                recall=example.record["recall"],
            )
            for label, example in examples
        ),
    )


def _kind(group: str, density: str, subtask: str) -> str:
    return " ".join(filter(None, (group, density, subtask)))


def inline_jpeg(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def browser_data(study: Path, rows: Sequence[Row], cards: Sequence[ExampleCard]) -> dict[str, Any] | None:
    """What the page's script shows in the predictions browser; None without a finished system.

    Samples, and for each system its (prediction, score) in the samples' order; (None, None) where it has none.
    """
    done = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if row["status"] == "ok"]
    if not done:
        return None
    samples: dict[str, dict[str, Any]] = {}
    predictions: list[dict[str, tuple[str, float | None]]] = []
    for row, _ in done:
        names = ["id", "question", "answers", "group", "density", "subtask", "prediction", f"score_{row['metric']}"]
        table = pq.read_table(study / row["job"] / SAMPLES, columns=names)
        of_row = {}
        for i, question, expected, group, density, subtask, prediction, score in zip(
            *table.to_pydict().values(), strict=True
        ):
            kind = _kind(group, density, subtask)
            samples.setdefault(i, {"id": i, "question": question, "answers": expected, "kind": kind})
            of_row[i] = (printable(prediction, LONGEST_PREDICTION), score)
        predictions.append(of_row)
    ids = list(samples)[:MOST_SAMPLES]
    card_numbers = {card.id: number for number, card in enumerate(cards)}
    first = next((i for i, (row, _) in enumerate(done) if row["selector"] == BASELINE), 0)
    ours = our_row(rows)
    second = next((i for i, (row, _) in enumerate(done) if row is ours and i != first), (first + 1) % len(done))
    return {
        "right": RIGHT,
        "of": len(samples),
        "first": first,
        "second": second,
        "samples": [{**samples[i], "card": card_numbers.get(i)} for i in ids],
        "systems": [
            {"label": label, "predictions": [of_row.get(i, (None, None)) for i in ids]}
            for (_, label), of_row in zip(done, predictions, strict=True)
        ],
    }
