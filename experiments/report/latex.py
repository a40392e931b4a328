"""table.tex: the table of a paper, with booktabs, and a caption about what is in it."""

from collections.abc import Sequence

import pandas as pd

from experiments.analysis.columns import EMPTY, Cell, Column, columns, differences, n_cell, of_full
from experiments.analysis.paired import BASELINE, OF_FULL
from experiments.analysis.rows import Row, unequal
from experiments.analysis.system_names import labels
from experiments.analysis.table import comparable, parts

LEFT_OUT = ("status", "n", "note", "flags", "steps", "trained parameters")
"""Columns of no interest to a reader of a paper; the caption says n."""
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


def latex(rows: Sequence[Row]) -> str:
    """A complete `table` environment with the finished rows; those over a part of the samples only where there are no
    others.
    """
    rows = parts([row for row in rows if row["status"] == "ok"])[0][1]
    shown = [c for c in columns(rows) if not c.secondary and c.title not in LEFT_OUT]
    bests = [column.best(comparable(rows)) for column in shown]
    cells = [
        [latex_cell(cell, i in best) for i, cell in enumerate(column.cells)]
        for column, best in zip(shown, bests, strict=True)
    ]
    table = pd.DataFrame(list(zip(*cells, strict=True)), columns=[latex_text(column.title) for column in shown])
    align = "".join("r" if column.numeric else "l" for column in shown)
    return "\n".join(
        (
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            table.to_latex(index=False, escape=False, column_format=align).rstrip(),
            rf"\caption{{{latex_text(caption(rows, shown, bold=any(bests)))}}}",
            r"\end{table}",
            "",
        )
    )


def caption(rows: Sequence[Row], shown: Sequence[Column], *, bold: bool) -> str:
    """Sentences about the columns that are there, with the short names of systems and data; without any path."""
    there = {(column.kind, column.title) for column in shown}
    data = ", ".join(dict.fromkeys(str(row["dataset"] or row["data"]) for row in rows))
    n = ", ".join(dict.fromkeys(f"n = {n_cell(row).main}" for row in rows if row["n"]))
    metrics = ", ".join(dict.fromkeys(row["metric"] for row in rows if row["metric"]))
    deltas = [name for name in differences(rows) if ("difference", name) in there]
    names = dict(zip((row["job"] for row in rows), labels(rows), strict=True))
    bases = dict.fromkeys(names.get(row.get(f"compared to {BASELINE}")) for row in rows)
    base = ", ".join(name for name in bases if name and name != BASELINE)
    measured = [column for column in shown if column.measured]
    quartiles = any(cell.quartiles for column in measured for cell in column.cells)
    sentences = [
        f"{data}{', ' if n else ''}{n}.",
        f"Scores ({metrics}) in % [95 % interval]." if metrics else "",
        "Differences: paired on the same samples, in points; *: p < 0.05 after Holm's correction." if deltas else "",
        f"{BASELINE} stands for {base}." if deltas and base else "",
        f"{OF_FULL}: share of the score with all tokens." if of_full(rows) else "",
        f"ms: median per sample{' (quartiles over batches)' if quartiles else ''}." if measured else "",
        f"(n x): n times the tokens of {BASELINE}." if any(unequal(row) for row in rows) else "",
        f"Bold: best at the budget of {BASELINE}." if bold else "",
    ]
    return " ".join(filter(None, sentences))


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
