"""report.html: one page with the study's tables, figures, examples, every answer, commands and environment.

It is made of the jobs' own files alone; page.html is its template, page.css its style, page.js and
page_viewer.js are its script.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.analysis.columns import EMPTY, Cell, Column, columns
from experiments.analysis.paired import OF_FULL
from experiments.analysis.rows import MOST_DRAWN, Row, unequal
from experiments.analysis.system_names import labels
from experiments.analysis.systems import Result
from experiments.analysis.table import StudyTable, comparable, legend, parts, records
from experiments.atomic_files import write_atomic
from experiments.report.answer_browser import RIGHT, browser_data
from experiments.report.example_cards import FEW_SYSTEMS, MANY_SYSTEMS, example_cards
from experiments.report.verdict import commit, heading, origin, verdict

if TYPE_CHECKING:
    from experiments.report.figure_style import ReportFigure

NAME = "report.html"
SCRIPTS = ("page.js", "page_viewer.js")
DETAILS = ("steps", "trained parameters")
"""Columns that are shown with "every column" only, besides the secondary ones."""
ROOMY = ("n", "seeds", "recall", "cache KiB", "max logit drift", "same top-1", "peak MiB", "flags", "status", "note")
"""Columns that narrow screens show only with "every column"."""
MOST_COLUMNS = 14
"""Columns that fit beside each other with intervals on one line; with more, intervals have two."""
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
    names = labels(rows)
    unfinished = [(name, row) for name, row in zip(names, rows, strict=True) if row["status"] != "ok"]
    shown = _arranged(columns(rows), status_first=bool(unfinished))
    classes = [_head_class(column, all_ok=not unfinished) for column in shown]
    cards = example_cards(study, rows)
    equal = [not unequal(row) for row in rows]
    number = {row["job"]: i for i, row in enumerate(rows)}
    groups = [(title, [number[row["job"]] for row in part]) for title, part in parts(rows)]
    script = "".join((_HERE / name).read_text() for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    finished = [row for row in rows if row["status"] == "ok"]
    untrained = sorted({r["choices"]["model"] for r in known if r.get("model", {}).get("trained") is False})
    # Scores of random weights are chance: none of them is the best one.
    marked = [column.sign if not (untrained and column.kind in ("score", "difference")) else 0 for column in shown]
    return environment.get_template("page.html").render(
        study=study.name,
        heading=heading(known),
        origin=origin(known),
        verdict=verdict(parts(finished)[0][1]) if finished else "",
        columns=shown,
        rows=rows,
        most_rows=MOST_ROWS,
        stored=stored_rows(rows, shown, equal, groups) if len(rows) > MOST_ROWS else None,
        labels=names,
        head_classes=classes,
        large=_large,
        small=_small,
        tight=sum("detail" not in kinds for kinds in classes) > MOST_COLUMNS,
        marked=marked,
        open_cards=OPEN_CARDS,
        few_systems=FEW_SYSTEMS if len(rows) > MANY_SYSTEMS else None,
        groups=groups,
        equal=equal,
        equal_first=not all(equal) and sum(equal) > len(equal) / 2,
        legend=legend(rows),
        best=[column.best(comparable(rows)) if sign else set() for column, sign in zip(shown, marked, strict=True)],
        untrained=untrained,
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


def _arranged(shown: Sequence[Column], *, status_first: bool) -> list[Column]:
    """The columns as the page shows them: what is not finished says so beside its name."""
    status = [c for c in shown if status_first and (c.kind, c.title) == ("text", "status")]
    rest = [column for column in shown if column not in status]
    return [*rest[:1], *status, *rest[1:]]


def _head_class(column: Column, *, all_ok: bool) -> str:
    """Classes of a column's cells: `detail` is shown on request, `roomy` is left out on narrow screens."""
    same = column.title == "n" and len(set(column.texts) - {EMPTY}) == 1
    done = all_ok and (column.kind, column.title) == ("text", "status")
    applies = {
        "num": column.numeric,
        "cost": column.kind == "cost",
        "detail": column.secondary or column.title in DETAILS or same or done,
        "roomy": column.title in ROOMY or column.title.endswith(f"{OF_FULL}, %"),
    }
    return " ".join(name for name, does in applies.items() if does)


def stored_rows(
    rows: Sequence[Row], shown: Sequence[Column], equal: Sequence[bool], groups: Sequence[tuple[str, list[int]]]
) -> dict[str, Any]:
    """All rows as data, from which the script makes those that are looked at; the page holds the first ones only.

    A cell is its text, value, what stands below, hint and quartiles, without empty ones at the end.
    """
    cells = [[_stored_cell(column.cells[i]) for column in shown] for i in range(len(rows))]
    return {
        "most": MOST_ROWS,
        "parts": [numbers for _, numbers in groups],
        "rows": [{"equal": int(equal[i]), "command": row["command"], "cells": cells[i]} for i, row in enumerate(rows)],
    }


def _large(cell: Cell) -> str:
    """The text of a cell on its first line."""
    return (cell.main if cell.quartiles else cell.brief) + cell.tail


def _small(cell: Cell) -> str:
    """What stands below it: the interval of a score, or the quartiles of a time, which its spread says."""
    if cell.quartiles:
        return cell.spread.strip("()").replace("-", " to ")
    return " to ".join(cell.interval or ())


def _stored_cell(cell: Cell) -> list[Any]:
    value = None if cell.value is None else round(cell.value, 4)
    parts_of_cell: list[Any] = [_large(cell), value, _small(cell), cell.hint]
    parts_of_cell.append(" ".join(str(round(edge, 4)) for edge in cell.quartiles or ()))
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
        ("commit", lambda result: commit(result, 12)),
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
