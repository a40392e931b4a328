"""The style of every figure, and how a figure becomes a file or a part of the page."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

WIDTH = 5.5
"""Inches: the text width of a one-column paper. Type is 7 points and more at that width."""
INK, SOFT, GRID, ACCENT, PALE, PAPER = "#1b1f24", "#626b76", "#dfe3e8", "#2456c9", "#a9b2bd", "#fefefe"
HUES = ("#c2590c", "#1b7f4b", "#b0267f", "#0b7f8c", "#6b3fb5", "#7f7a0a", "#c0262d", "#7a5230")
"""Colours of the rivals, one for each selector: dark enough on white, and told apart by most eyes."""
THEMED = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    PALE: "var(--pale)",
    PAPER: "var(--card)",
    **{hue: f"var(--hue{number})" for number, hue in enumerate(HUES, 1)},
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
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
MOST_PANELS = 6
"""Panels of a figure that has one for each score."""
RESOLUTION = 300
TIP = "tip: "
"""How the name of an artist with a remark begins; the rest is the remark."""
LEGEND_LINE = 0.14
"""Inches of a line of a legend."""
FEW_LINES = 5
LETTERS = 92
"""Letters of a legend that fit on a line."""
_TIPPED = re.compile(rf'<g id="{TIP}([^"]*)">')


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
        """The figure as SVG, the same bytes every time; remarks are titles, which browsers show at the pointer."""
        buffer = io.StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _TIPPED.sub(r'<g class="tip"><title>\1</title>', buffer.getvalue())

    @cached_property
    def pdf(self) -> bytes:
        """The figure for LaTeX, the same bytes every time; its text is text."""
        buffer = io.BytesIO()
        none = dict.fromkeys(("Creator", "Producer", "CreationDate"))
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="pdf", metadata=none)
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


def with_tip(artists: Artist | Iterable[Artist], remark: str) -> None:
    """Lets browsers show a remark where the pointer is on one of the artists."""
    for artist in (artists,) if isinstance(artists, Artist) else artists:
        artist.set_gid(TIP + remark)


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


def round_log_ticks(axes: Axes) -> None:
    """A logarithmic y axis marked at 1, 2 and 5 times the powers of ten, as plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
