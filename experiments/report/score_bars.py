"""Bars of every score by kind of question, with intervals, and how much of it is left of keeping all tokens."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from experiments.analysis.columns import headlines
from experiments.analysis.paired import FULL
from experiments.analysis.rows import Row
from experiments.analysis.system_names import labels
from experiments.report.figure_style import INK, MOST_PANELS, PALE, SOFT, ReportFigure, panels, with_tip
from experiments.report.system_styles import SystemStyles

BAR = 0.13
"""Inches of the height of a bar."""
ACROSS = 3
END = 128.0
"""Where the axis of scores ends, in %: behind 100 there is room for the numbers."""


def score_bars(rows: Sequence[Row], styles: SystemStyles) -> ReportFigure | None:
    """A panel for each group of questions and density (or metric), a bar for each system; in all the same order."""
    scores = headlines(rows)[:MOST_PANELS]
    if not scores or len(rows) < 2:
        return None
    names = dict(zip((row["job"] for row in rows), labels(rows, with_data=False), strict=True))
    order = list(dict.fromkeys(names.values()))
    figure, axes = panels(len(scores), ACROSS, 0.5 + BAR * len(order), share_y=True)
    for panel, (title, key, part) in zip(axes, scores, strict=True):
        known = [row for row in part if row.get(f"{key} mean") is not None]
        full = next((row for row in known if row["selector"] == FULL), None)
        top = None if full is None else 100 * full[f"{key} mean"]
        for row in known:
            _bar(panel, order.index(names[row["job"]]), row, key, names[row["job"]], styles.of(row).colour, top)
        if top is not None:
            panel.axvline(top, color=PALE, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0.5)
        panel.set_title(title, loc="left")
    _frame(axes, order)
    figure.supxlabel("score, %", fontsize=7.5)
    kept = f"; dashed: {FULL}, which keeps all tokens" if any(r["selector"] == FULL for r in rows) else ""
    caption = f"Score in % by kind of question, with 95 % intervals{kept}."
    return ReportFigure("scores", "Scores by kind of question", caption, figure)


def _frame(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Systems down the shared y axis, the first on top; scores from 0 to 100."""
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    for panel in axes:
        panel.set_xlim(0, END)
        panel.set_xticks([0, 50, 100])
        panel.tick_params(axis="y", labelcolor=INK, labelsize=6.5)
        panel.grid(axis="y", visible=False)


def _bar(panel: Axes, y: int, row: Row, key: str, name: str, colour: str, top: float | None) -> None:
    """A score with its interval and its number.

    Args:
        y: the row of the panel.
        top: the score with all tokens, in %, where it is known; the remark says what is left of it.
    """
    low, mean, high = (100 * row[f"{key} {edge}"] for edge in ("low", "mean", "high"))
    (bar,) = panel.barh([y], [mean], height=0.7, color=colour, alpha=0.55, linewidth=0)
    panel.plot([low, high], [y, y], color=colour, linewidth=1, marker="|", markersize=4)
    panel.text(high, y, f" {mean:.1f}", va="center", fontsize=6, color=SOFT)
    left = "" if not top else f", {100 * mean / top:.0f} % of {FULL}"
    with_tip(bar, f"{name}: {mean:.1f} % [{low:.1f}, {high:.1f}]{left}")
