"""What a study leaves behind for its readers: the page, and on request figures, tables and slides as files."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report.figures import draw
from experiments.report.latex import latex
from experiments.report.page import write_report
from experiments.report.plot import ReportFigure
from experiments.study.files import write_atomic, write_json
from experiments.study.rows import Row
from experiments.study.table import refresh

FIGURES = "figures"


def publish(study: Path, *, files: bool = False) -> list[Path]:
    """Rebuilds tables and page from what the jobs left, with `files` also figures, LaTeX and the deck.

    Returns what was written.
    """
    rows = refresh(study)
    drawn = draw(study, rows)
    if not rows and not drawn:
        return []
    written = [write_report(study, rows, drawn)]
    return written + _files(study, rows, drawn) if files else written


def _files(study: Path, rows: Sequence[Row], drawn: Sequence[ReportFigure]) -> list[Path]:
    for one in drawn:
        write_atomic(study / FIGURES / f"{one.name}.svg", one.svg)
        write_atomic(study / FIGURES / f"{one.name}.png", one.png)
    if not any(row["status"] == "ok" for row in rows):
        return [study / FIGURES]
    write_atomic(study / "table.tex", latex(rows))
    write_json(study / "table.json", {"rows": rows})
    return [study / "table.tex", study / "table.json", study / FIGURES, *_deck(study, rows, drawn)]


def _deck(study: Path, rows: Sequence[Row], drawn: Sequence[ReportFigure]) -> list[Path]:
    if importlib.util.find_spec("pptx") is None:
        print("no deck.pptx: python-pptx is not installed; pip install -c constraints.txt -e '.[viz]'", file=sys.stderr)
        return []
    from experiments.report.deck import write_slides

    return [write_slides(study, rows, drawn)]
