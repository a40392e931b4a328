"""Writes what readers of a study open: the table files and the page, on request also figures, LaTeX and slides."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.analysis import memo
from experiments.analysis.table import read_table, records, refresh
from experiments.analysis.terminal_table import print_table
from experiments.analysis.turns import if_due, in_turn
from experiments.atomic_files import write_atomic, write_json
from experiments.errors import ConfigError
from experiments.report.figure_style import ReportFigure
from experiments.report.figures import draw
from experiments.report.latex import latex
from experiments.report.page import write_report

FIGURES = "figures"
WAIT_S = 30.0
"""Longest wait for another process that writes the same study."""


def publish(study: Path, *, files: bool = False, show: bool = False, wide: bool = False) -> list[Path]:
    """Reads the study once and rewrites its table files and its page.

    A process that is writing them already is waited for a few seconds; it then writes this study's state of now, too.

    Args:
        files: also writes figures, LaTeX, JSON and slides as files.
        show: also prints the table, as much of it as fits into the terminal.
        wide: prints all of it.

    Returns:
        What was written besides the table files; nothing for a study without a job to show.
    """
    study.mkdir(parents=True, exist_ok=True)
    found = in_turn(study, lambda: _write(study, files), WAIT_S, must=files)
    if found is None and files:
        raise ConfigError(f"{study}: another process has been writing its table for {WAIT_S:.0f} s; try again later")
    frame, written = found or (read_table(study), [])
    if show:
        print_table(frame, study, wide=wide)
    return written


def refresh_report(study: Path) -> None:
    """What a job does at its end: the table files and the page, without figures and overlaps, where it is time."""
    if_due(study, lambda: _write_quickly(study), lambda: _write(study, files=False))


def _write(study: Path, files: bool) -> tuple[pd.DataFrame, list[Path]]:
    table = refresh(study)
    figures = draw(table)
    written = []
    if figures or not table.frame.empty:
        written.append(write_report(table, figures))
        written += _write_files(study, table.frame, figures) if files else []
    table.memo.save(study / memo.NAME, prune=True)
    return table.frame, written


def _write_quickly(study: Path) -> None:
    table = refresh(study, overlaps=False)
    if not table.frame.empty:
        write_report(table)


def _write_files(study: Path, frame: pd.DataFrame, figures: Sequence[ReportFigure]) -> list[Path]:
    for one in figures:
        write_atomic(study / FIGURES / f"{one.name}.svg", one.svg)
        write_atomic(study / FIGURES / f"{one.name}.png", one.png)
        write_atomic(study / FIGURES / f"{one.name}.pdf", one.pdf)
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
