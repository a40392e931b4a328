"""Samples as people look at them: the picture, what each system kept of it, and what it answered."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.analysis.columns import Column, columns, comparable, labels, legend, our_row, parts, unequal
from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row
from experiments.atomic_files import write_atomic
from experiments.jobs.results import SAMPLES, SHOTS, read_result
from experiments.viz.examples import ExampleRecord, load_examples

if TYPE_CHECKING:
    from experiments.report.figure_style import ReportFigure


MAX_SHOTS = 8
MAX_PICTURES = 120
"""Pictures on a page: with many systems there are fewer samples, so that the page still opens at once."""
LONGEST_ANSWER = 40
RIGHT = 0.5
"""A score from here on counts as right where a sample is called right or wrong."""


@dataclass(frozen=True)
class SelectorView:
    """What one system kept and answered."""

    label: str
    image: str
    heat: str | None
    prediction: str
    score: float | None
    kept: str
    recall: float | None


@dataclass(frozen=True)
class ExampleCard:
    """One sample, as every system saw it."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    picture: str
    seen: tuple[SelectorView, ...]


def example_cards(study: Path, rows: Sequence[Row]) -> list[ExampleCard]:
    """The samples that most systems drew, in the order in which they were chosen."""
    seen: dict[str, list[tuple[str, ExampleRecord]]] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        for shot in load_examples(study / row["job"] / SHOTS):
            seen.setdefault(shot.record["id"], []).append((label, shot))
    most = max(1, min(MAX_SHOTS, MAX_PICTURES // (1 + len(rows))))
    common = sorted(seen, key=lambda sample: (-len(seen[sample]), list(seen).index(sample)))[:most]
    return [_example_card(seen[sample]) for sample in common]


def _example_card(views: Sequence[tuple[str, ExampleRecord]]) -> ExampleCard:
    first = views[0][1].record
    return ExampleCard(
        id=first["id"],
        question=first["question"],
        answers=tuple(first["answers"]),
        kind=" ".join(part for part in (first["group"], first["density"], first["subtask"]) if part),
        picture=inline_jpeg(views[0][1].picture),
        seen=tuple(
            SelectorView(
                label=label,
                image=inline_jpeg(shot.overlay),
                heat=None if shot.heat is None else inline_jpeg(shot.heat),
                prediction=printable(shot.record["prediction"]),
                score=next(iter(shot.record["scores"].values())),
                kept=f"{shot.record['n_visual']} tokens"
                + "".join(f", {count} {source}" for source, count in shot.record["sources"].items() if count),
                recall=shot.record["recall"],
            )
            for label, shot in views
        ),
    )


def printable(text: str, longest: int = LONGEST_ANSWER) -> str:
    """The text, not too long, with control characters spelt out, so that nothing a model says is invisible."""
    spelt = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return spelt if len(spelt) <= longest else spelt[:longest] + "..."


def inline_jpeg(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


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


NAME = "report.html"
DETAILS = frozenset({"prefix tokens", "select ms", "prefill ms", "cache ms", "denoise ms"})
"""Columns that the page shows on request: the figures have them too."""
OPEN_CARDS = 3
_HERE = Path(__file__).parent

Result = Mapping[str, Any]
"""A result.json."""


def write_report(study: Path, rows: Sequence[Row], figures: "Sequence[ReportFigure]" = ()) -> Path:
    """Writes the page from the jobs' own files; no dataset and no model is needed.

    Args:
        figures: none while the study is running; they take longer to draw than the rest.
    """
    path = study / NAME
    write_atomic(path, render(study, rows, figures))
    return path


def render(study: Path, rows: Sequence[Row], figures: "Sequence[ReportFigure]" = ()) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    results = [read_result(study / row["job"]) for row in rows]
    known = [result for result in results if result is not None]
    shown = columns(rows)
    drawn = example_cards(study, rows)
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
        details=DETAILS | ({"status"} if all(row["status"] == "ok" for row in rows) else set()),
        open_cards=OPEN_CARDS,
        groups=groups,
        equal=equal,
        equal_first=not all(equal) and sum(equal) > 1,
        baseline=BASELINE,
        legend=legend(rows),
        directions=[direction(column) for column in shown],
        best=[best(column, comparable(rows)) for column in shown],
        untrained=sorted({r["choices"]["model"] for r in known if r.get("model", {}).get("trained") is False}),
        synthetic=sorted({row["dataset"] for row in rows if (row["dataset"] or "").startswith("synth_")}),
        unfinished=[row for row in rows if row["status"] != "ok"],
        facts=_facts(known),
        figures=figures,
        cards=drawn,
        right=RIGHT,
        has_targets=any(row.get("recall mean") is not None for row in rows),
        data=prediction_rows(study, rows, drawn),
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup(script),
        digest=digest,
    )


def best(column: Column, among: Sequence[bool]) -> set[int]:
    """Rows with the highest score, or the lowest time or memory; nothing is best among fewer than two."""
    sign = direction(column)
    values = {i: sign * c.value for i, c in enumerate(column.cells) if sign and among[i] and c.value is not None}
    return {i for i, value in values.items() if value == max(values.values())} if len(values) > 1 else set()


def direction(column: Column) -> int:
    """1 where more is better, -1 where less is, 0 where neither is."""
    if column.kind == "score" or " vs " in f" {column.title}":
        return 1
    return -1 if column.title.endswith((" ms", " MiB")) else 0


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
