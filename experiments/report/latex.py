"""The study's table for a paper: booktabs, scores with their intervals, the best of each column bold."""

import re
from collections.abc import Sequence

from experiments.report.page import best
from experiments.study.cells import Cell
from experiments.study.layout import Column, columns, comparable, legend, parts
from experiments.study.rows import Row

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
