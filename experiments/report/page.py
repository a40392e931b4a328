"""report.html: one page with the study's tables, figures, examples, every answer, commands and environment.

It is made of the jobs' own files alone; page.html is its template, page.css its style and page.js its script.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.analysis.columns import Cell, Column, columns
from experiments.analysis.rows import MOST_DRAWN, Row, unequal
from experiments.analysis.system_names import labels
from experiments.analysis.systems import Result
from experiments.analysis.table import StudyTable, comparable, legend, parts, records
from experiments.atomic_files import write_atomic
from experiments.report.answer_browser import RIGHT, browser_data
from experiments.report.example_cards import FEW_SYSTEMS, MANY_SYSTEMS, example_cards

if TYPE_CHECKING:
    from experiments.report.figure_style import ReportFigure

NAME = "report.html"
OPEN_CARDS = 3
"""Examples that are shown at once; the others are shown on request."""
MOST_ROWS = 100
"""Rows of the table that are in the page as they are shown; more are data, and shown on request."""
MOST_BANNERS = 10
"""Unfinished systems that are named at the top."""
MOST_FACTS = 10
"""Different models, machines and so on that are named."""
_HERE = Path(__file__).parent


def write_report(table: StudyTable, figures: "Sequence[ReportFigure]" = ()) -> Path:
    """Writes the page from the jobs' own files; no dataset and no model is needed.

    Args:
        figures: none while the study is running; they take longer to draw than the rest.
    """
    path = table.study / NAME
    write_atomic(path, render(table, figures))
    return path


def render(table: StudyTable, figures: "Sequence[ReportFigure]" = ()) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    study, rows = table.study, records(table.frame)
    known = [table.results[study / row["job"]] for row in rows]
    shown = columns(rows)
    cards = example_cards(study, rows)
    equal = [not unequal(row) for row in rows]
    number = {row["job"]: i for i, row in enumerate(rows)}
    groups = [(title, [number[row["job"]] for row in part]) for title, part in parts(rows)]
    script = (_HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    unfinished = [row for row in rows if row["status"] != "ok"]
    return environment.get_template("page.html").render(
        study=study.name,
        columns=shown,
        rows=rows,
        most_rows=MOST_ROWS,
        stored=stored_rows(rows, shown, equal, groups) if len(rows) > MOST_ROWS else None,
        labels=labels(rows),
        all_ok=not unfinished,
        open_cards=OPEN_CARDS,
        few_systems=FEW_SYSTEMS if len(rows) > MANY_SYSTEMS else None,
        groups=groups,
        equal=equal,
        equal_first=not all(equal) and sum(equal) > 1,
        legend=legend(rows),
        best=[column.best(comparable(rows)) for column in shown],
        untrained=sorted({r["choices"]["model"] for r in known if r.get("model", {}).get("trained") is False}),
        synthetic=sorted({row["dataset"] for row in rows if (row["dataset"] or "").startswith("synth_")}),
        unfinished=unfinished,
        most_banners=MOST_BANNERS,
        facts=_facts(known),
        figures=figures,
        most_drawn=MOST_DRAWN,
        cards=cards,
        right=RIGHT,
        has_targets=any(row.get("recall mean") is not None for row in rows),
        data=browser_data(study, rows, cards),
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup(script),
        digest=digest,
    )


def stored_rows(
    rows: Sequence[Row], shown: Sequence[Column], equal: Sequence[bool], groups: Sequence[tuple[str, list[int]]]
) -> dict[str, Any]:
    """All rows as data, from which the script makes those that are looked at; the page holds the first ones only.

    A cell is its text, value, interval and hint, without empty ones at the end.
    """
    cells = [[_stored_cell(column.cells[i]) for column in shown] for i in range(len(rows))]
    return {
        "most": MOST_ROWS,
        "parts": [numbers for _, numbers in groups],
        "rows": [{"equal": int(equal[i]), "command": row["command"], "cells": cells[i]} for i, row in enumerate(rows)],
    }


def _stored_cell(cell: Cell) -> list[Any]:
    value = None if cell.value is None else round(cell.value, 4)
    parts_of_cell: list[Any] = [cell.brief + cell.tail, value, " to ".join(cell.interval or ()), cell.hint]
    while len(parts_of_cell) > 1 and parts_of_cell[-1] in (None, ""):
        parts_of_cell.pop()
    return parts_of_cell


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
            different = list(dict.fromkeys(map(describe, done)))
            more = f"; {len(different) - MOST_FACTS} more" if len(different) > MOST_FACTS else ""
            facts.append((title, "; ".join(different[:MOST_FACTS]) + more))
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
