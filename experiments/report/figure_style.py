"""The style of every figure, and how a figure becomes a file or a part of the page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row

WIDTH = 5.5
"""Inches: the text width of a one-column paper. Type is 7 points and more at that width."""
INK, SOFT, GRID, ACCENT, PALE, PAPER = "#1b1f24", "#626b76", "#dfe3e8", "#2456c9", "#a9b2bd", "#fefefe"
THEMED = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    PALE: "var(--pale)",
    PAPER: "var(--card)",
}
"""The page replaces these colours, so that figures follow its light and dark themes."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
MARKERS = "os^DvPX<>*ph"
MOST_PANELS = 6
"""Panels of a figure that has one for each score."""
RESOLUTION = 300
LEGEND_LINE = 0.14
"""Inches of a line of a legend."""
FEW_LINES = 5
LETTERS = 92
"""Letters of a legend that fit on a line."""


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its title and its caption."""

    name: str
    title: str
    caption: str
    figure: Figure

    def __post_init__(self) -> None:
        # The layout is computed once: otherwise every format would compute it again.
        with matplotlib.rc_context(STYLE):
            self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    @cached_property
    def svg(self) -> str:
        """The figure as SVG, the same bytes every time."""
        buffer = io.StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    @cached_property
    def png(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=RESOLUTION, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    @property
    def element(self) -> str:
        """The figure as a part of the page: in the page's colours and font, as wide as its panel."""
        text = self.svg[self.svg.index("<svg") :]
        for colour, variable in THEMED.items():
            text = text.replace(colour, variable)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        role = f'<svg role="img" aria-label="{self.title}"'
        text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"', rf"{role} \1", text)
        return re.sub(r"\s*\n\s*", " ", text)


def panels(n: int, across: int, height: float, *, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of paper width with n panels, each `height` inches high."""
    across = min(n, across)
    rows = -(-n // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, across, squeeze=False, sharey=share_y)
    axes = list(grid.flat)
    for unused in axes[n:]:
        unused.remove()
    return figure, axes[:n]


def top_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], **style: Any) -> None:
    """A legend above the panels; the figure grows by the lines that it has beyond a few."""
    n_columns = legend_columns(names)
    more = max(0, -(-len(names) // n_columns) - FEW_LINES)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * more)
    figure.legend(handles, names, loc="outside upper left", ncols=n_columns, **style)


def legend_columns(names: Sequence[str]) -> int:
    """How many of the names fit side by side at paper width."""
    return max(1, min(4, LETTERS // (4 + max(map(len, names)))))


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with a handful of round numbers, where values span more than a factor of three."""
    if min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set_xscale("log")
    low, high = min(values) / 1.25, max(values) * 1.25
    ticks = [m * 10.0**e for e in range(-3, 7) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlim(low, high)


def colour(row: Row) -> str:
    return ACCENT if row["selector"].startswith("shirg") else INK if row["selector"] == BASELINE else SOFT
