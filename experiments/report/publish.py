"""What a study leaves behind for its readers: the page, and on request figures, tables and slides as files."""

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.analysis.columns import Cell, Column, columns, comparable, legend, parts
from experiments.analysis.rows import Row
from experiments.analysis.table import refresh
from experiments.atomic_files import write_atomic, write_json
from experiments.report.figure_style import ReportFigure
from experiments.report.figures import draw
from experiments.report.page import best, write_report

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
    from experiments.report.slides import write_slides

    return [write_slides(study, rows, drawn)]


_LEFT_OUT = ("status", "n", "prefix tokens", "select ms", "prefill ms", "cache ms", "denoise ms")
_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


def latex(rows: Sequence[Row]) -> str:
    """A complete `table` environment, for booktabs; rows over a part of the samples only where there are no others."""
    rows = parts(rows)[0][1]
    shown = [column for column in columns(rows) if column.title not in _LEFT_OUT]
    top = [best(column, comparable(rows)) for column in shown]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering\small",
        rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in shown)}}}",
        r"\toprule",
        " & ".join(escape(column.title) for column in shown) + r" \\",
        r"\midrule",
        *(
            " & ".join(_cell(c, c.cells[i], i in b) for c, b in zip(shown, top, strict=True)) + r" \\"
            for i in range(len(rows))
        ),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{escape(legend(rows))} Bold: best at equal budget.}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """The text with everything that TeX would read as a command made harmless."""
    return "".join(_SPECIAL.get(c, c) for c in text)


def _cell(column: Column, cell: Cell, top: bool) -> str:
    found = (
        re.fullmatch(r"(\S+)(.*?) \[(.+), (.+)\](\*?)", cell.text) if column.kind in ("score", "difference") else None
    )
    if found is None:
        text = "--" if cell.text == "-" else escape(cell.text)
        return rf"\textbf{{{text}}}" if top else text
    mean, between, low, high, star = found.groups()
    bold = rf"\textbf{{{mean}}}" if top else mean
    return rf"{bold}{star}{escape(between)} {{\scriptsize[{low}, {high}]}}".replace("-", "$-$")
