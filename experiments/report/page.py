"""`report.html`: a study on one page that opens anywhere, with no script and no request to the network."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report.shots import Shot, load_shots
from experiments.study.files import write_atomic
from experiments.study.layout import columns, legend
from experiments.study.record import read_result
from experiments.study.rows import Row, collect

NAME = "report.html"
SHOTS = "shots"
MAX_SHOTS = 8
LONGEST_ANSWER = 40
_HERE = Path(__file__).parent

Result = Mapping[str, Any]
"""A result.json."""


@dataclass(frozen=True)
class Seen:
    """What one job kept and answered."""

    label: str
    image: str
    prediction: str
    score: float | None
    kept: str
    recall: float | None


@dataclass(frozen=True)
class Card:
    """One sample, as every job saw it."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    picture: str
    seen: tuple[Seen, ...]


def write_report(study: Path) -> Path:
    """Writes the page from the jobs' own files; no dataset and no model is needed."""
    rows = collect(study)
    path = study / NAME
    write_atomic(path, render(study, rows))
    return path


def render(study: Path, rows: Sequence[Row]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    results = [read_result(study / row["job"]) for row in rows]
    known = [result for result in results if result is not None]
    shown = columns(rows)
    return environment.get_template("page.html").render(
        study=study.name,
        columns=shown,
        rows=rows,
        legend=legend(rows),
        best=[_best(column.title, column.cells, rows) for column in shown],
        untrained=sorted({r["choices"]["model"] for r in known if r.get("model", {}).get("trained") is False}),
        synthetic=sorted({row["dataset"] for row in rows if (row["dataset"] or "").startswith("synth_")}),
        facts=_facts(known),
        commands=[result["command"] for result in known],
        cards=_cards(study, rows),
        has_targets=any(row.get("recall mean") is not None for row in rows),
    )


def _best(title: str, cells: Sequence[str], rows: Sequence[Row]) -> set[int]:
    """Rows with the highest score in a column of intervals; nothing is best among fewer than two."""
    scores = [re.match(r"(-?[\d.]+) \[", cell) for cell in cells]  # not any text with a bracket: reasons are cells too
    scored = {i: float(score[1]) for i, score in enumerate(scores) if score and " vs " not in f" {title}"}
    if len(scored) < 2:
        return set()
    top = max(scored.values())
    return {i for i, value in scored.items() if value == top}


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
    model = result["model"]
    return (
        f"{result['choices']['model']}, {model['parameters'] / 1e6:.3g} M parameters, weights {model['weights'][:12]}"
    )


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


def _cards(study: Path, rows: Sequence[Row]) -> list[Card]:
    seen: dict[str, list[tuple[str, Shot]]] = {}
    differs = len({row["changes"] for row in rows}) > 1
    for row in rows:
        label = " ".join(filter(None, (row["selector"], row["budget"], row["changes"] if differs else "")))
        for shot in load_shots(study / row["job"] / SHOTS):
            seen.setdefault(shot.record["id"], []).append((label, shot))
    common = sorted(seen, key=lambda sample: (-len(seen[sample]), list(seen).index(sample)))[:MAX_SHOTS]
    return [_card(seen[sample]) for sample in common]


def _card(views: Sequence[tuple[str, Shot]]) -> Card:
    first = views[0][1].record
    return Card(
        id=first["id"],
        question=first["question"],
        answers=tuple(first["answers"]),
        kind=" ".join(part for part in (first["group"], first["density"], first["subtask"]) if part),
        picture=_inline(views[0][1].picture),
        seen=tuple(
            Seen(
                label=label,
                image=_inline(shot.overlay),
                prediction=_printable(shot.record["prediction"]),
                score=next(iter(shot.record["scores"].values())),
                kept=f"{shot.record['n_visual']} tokens"
                + "".join(f", {count} {source}" for source, count in shot.record["sources"].items() if count),
                recall=shot.record["recall"],
            )
            for label, shot in views
        ),
    )


def _printable(text: str) -> str:
    """The text, not too long, with control characters spelt out, so that nothing a model says is invisible."""
    spelt = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return spelt if len(spelt) <= LONGEST_ANSWER else spelt[:LONGEST_ANSWER] + "..."


def _inline(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
