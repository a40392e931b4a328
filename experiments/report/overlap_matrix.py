"""The figure of what systems keep in common: a matrix of Jaccard's index, with the value by chance opposite."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.analysis.columns import EMPTY
from experiments.analysis.overlap import MOST_COMPARED, PREFIX
from experiments.analysis.rows import Row
from experiments.analysis.system_names import labels
from experiments.report.figure_style import ACCENT, GRID, INK, PAPER, SOFT, STYLE, WIDTH, ReportFigure

CELL = 0.3
"""Inches: the largest cell. Many systems have smaller ones, down to what two digits need."""
NAMES = 1.6
"""Inches that the names of the systems have at most."""
DARK = 0.55
"""From this share of the largest value on, the number in a cell is light."""
LONGEST = 26
"""Letters of a name that are shown."""
MOST = 28
"""Systems of a matrix at paper width: with more, two digits do not fit into a cell."""


def overlap_matrix(rows: Sequence[Row]) -> ReportFigure | None:
    """Every two systems' overlap; systems that share no token frame with any other are left out."""
    keys = {f"{PREFIX}{row['job']} mean" for row in rows}
    there = [any(row[key] is not None for key in keys & row.keys()) for row in rows]
    shown = [row for row, known in zip(rows, there, strict=True) if known][:MOST]
    if len(shown) < 2:
        return None
    names = [_shortened(name) for name in labels(shown)]
    n = len(shown)
    side = min(CELL, (WIDTH - NAMES) / n)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, n * side + NAMES), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
    measured, chance, counts = (_values(shown, key) for key in ("mean", "chance", "n"))
    largest = max(measured.values()) or 1.0
    for i, j in product(range(n), repeat=2):
        if i > j:
            _cell(panel, i, j, measured.get((i, j)), largest)
        else:
            _cell(panel, i, j, chance.get((i, j)), None)
    _frame(panel, names)
    fewest, most = min(counts.values()), max(counts.values())
    samples = str(fewest) if fewest == most else f"{fewest} to {most}"
    more = f"; {sum(there) - n} more do not fit" if sum(there) > n else ""
    if len(rows) > MOST_COMPARED:
        more += f"; of each kind only the first {MOST_COMPARED} in the table are compared with each other"
    caption = (
        "Below the diagonal, in %: tokens that two systems both keep, as a share of those that either of them keeps "
        "(Jaccard's index, mean over samples and seeds), from white to blue up to the largest. Above it, in grey: the "
        f"same for two random selections of the same sizes. Samples of each pair: {samples}. {EMPTY}: not comparable, "
        "because data, geometry, model or adapter setting differ. Systems that keep no source token, such as pooled, "
        f"are left out{more}."
    )
    return ReportFigure("overlap", "Overlap of what is kept", caption, figure)


def _values(rows: Sequence[Row], key: str) -> dict[tuple[int, int], Any]:
    """What is known of every two systems, by their numbers."""
    found = {
        (i, j): row.get(f"{PREFIX}{other['job']} {key}")
        for i, row in enumerate(rows)
        for j, other in enumerate(rows)
        if i != j
    }
    return {pair: value for pair, value in found.items() if value is not None}


def _cell(panel: Axes, i: int, j: int, value: float | None, largest: float | None) -> None:
    """The cell of row i and column j: filled in proportion to `largest`; a value by chance, without it, is not."""
    if i == j:
        panel.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=GRID, linewidth=0))
        return
    shade = None if value is None or largest is None else value / largest
    if shade is not None:
        panel.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=ACCENT, alpha=shade, linewidth=0))
    tone = SOFT if shade is None else PAPER if shade >= DARK else INK
    text = EMPTY if value is None else f"{100 * value:.0f}"
    panel.text(j, i, text, ha="center", va="center", fontsize=7, color=tone)


def _frame(panel: Axes, names: list[str]) -> None:
    n = len(names)
    panel.set_xlim(-0.5, n - 0.5)
    panel.set_ylim(n - 0.5, -0.5)
    panel.set_aspect("equal")
    panel.grid(visible=False)
    panel.set_xticks(range(n), names, rotation=90)
    panel.set_yticks(range(n), names)
    panel.xaxis.tick_top()
    panel.tick_params(labelcolor=INK)
    panel.spines[:].set_visible(False)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
