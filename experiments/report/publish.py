"""Writes what readers of a study open: the table files and the page, on request also figures, LaTeX and slides."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.analysis.columns import EMPTY, Cell, columns
from experiments.analysis.rows import Row
from experiments.analysis.table import comparable, legend, parts, print_table, records, refresh
from experiments.atomic_files import write_atomic, write_json
from experiments.report.figure_style import ReportFigure
from experiments.report.figures import draw
from experiments.report.page import write_report

FIGURES = "figures"
_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)


def publish(study: Path, *, files: bool = False, show: bool = False) -> list[Path]:
    """Reads the study once and rewrites its table files and its page.

    Args:
        files: also writes figures, LaTeX, JSON and slides as files.
        show: also prints the table.

    Returns:
        What was written besides the table files; nothing for a study without a job to show.
    """
    frame = refresh(study)
    figures = draw(study, frame)
    written = []
    if figures or not frame.empty:
        written.append(write_report(study, frame, figures))
        written += _write_files(study, frame, figures) if files else []
    if show:
        print_table(frame, study)
    return written


def _write_files(study: Path, frame: pd.DataFrame, figures: Sequence[ReportFigure]) -> list[Path]:
    for one in figures:
        write_atomic(study / FIGURES / f"{one.name}.svg", one.svg)
        write_atomic(study / FIGURES / f"{one.name}.png", one.png)
    rows = records(frame)
    if not any(row["status"] == "ok" for row in rows):
        return [study / FIGURES]
    write_atomic(study / "table.tex", latex(rows))
    write_json(study / "table.json", {"rows": rows})
    return [study / "table.tex", study / "table.json", study / FIGURES, *_write_slides(study, frame, figures)]


def _write_slides(study: Path, frame: pd.DataFrame, figures: Sequence[ReportFigure]) -> list[Path]:
    if importlib.util.find_spec("pptx") is None:
        print("no deck.pptx: python-pptx is not installed; pip install -c constraints.txt -e '.[viz]'", file=sys.stderr)
        return []
    from experiments.report.slides import write_slides

    return [write_slides(study, frame, figures)]


def latex(rows: Sequence[Row]) -> str:
    """A complete `table` environment, for booktabs; rows over a part of the samples only where there are no others."""
    rows = parts(rows)[0][1]
    shown = [
        c for c in columns(rows) if not c.secondary and (c.kind, c.title) not in (("text", "status"), ("count", "n"))
    ]
    cells = [
        [latex_cell(cell, i in best) for i, cell in enumerate(column.cells)]
        for column, best in ((column, column.best(comparable(rows))) for column in shown)
    ]
    table = pd.DataFrame(list(zip(*cells, strict=True)), columns=[latex_text(column.title) for column in shown])
    align = "".join("r" if column.numeric else "l" for column in shown)
    return "\n".join(
        (
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            table.to_latex(index=False, escape=False, column_format=align).rstrip(),
            rf"\caption{{{latex_text(legend(rows))} Bold: best at equal budget.}}",
            r"\end{table}",
            "",
        )
    )


def latex_text(text: str) -> str:
    """The text with every character escaped that TeX would read as a command."""
    return text.translate(_SPECIAL)


def latex_cell(cell: Cell, bold: bool) -> str:
    main = "--" if cell.text == EMPTY else latex_text(cell.main)
    text = (rf"\textbf{{{main}}}" if bold else main) + latex_text(cell.tail)
    if cell.spread:
        text += f" {latex_text(cell.spread)}"
    if cell.interval:
        low, high = cell.interval
        text = rf"{text} {{\scriptsize[{low}, {high}]}}".replace("-", "$-$")
    return text
