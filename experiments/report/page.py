"""`report.html`: a study on one page that opens anywhere and asks the network for nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.report.browse import prediction_rows
from experiments.report.cards import RIGHT, example_cards
from experiments.study.cells import unequal
from experiments.study.compare import BASELINE
from experiments.study.files import write_atomic
from experiments.study.layout import Column, columns, comparable, labels, legend, parts
from experiments.study.record import read_result
from experiments.study.rows import Row

if TYPE_CHECKING:
    from experiments.report.plot import ReportFigure

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
