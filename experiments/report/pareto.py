"""Quality against a cost: every system with its interval, and the line of those that no other system beats on both."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.analysis.columns import doubts, headlines
from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row, unequal
from experiments.analysis.system_names import labels
from experiments.report.figure_style import (
    MARKERS,
    MOST_PANELS,
    PALE,
    PAPER,
    ReportFigure,
    colour,
    log_axis,
    panels,
    top_legend,
)


def pareto(rows: Sequence[Row], cost: str, axis: str, name: str) -> ReportFigure | None:
    """Quality against a cost: every system with its interval, and the line of those that no other beats on both."""
    known = [row for row in rows if row.get(cost) is not None]
    scores = headlines(known)[:MOST_PANELS]
    if not scores or len(known) < 2:
        return None
    figure, axes = panels(len(scores), 2, 1.75, share_y=True)
    entries = {label: row for _, _, part in scores for row, label in zip(part, labels(part), strict=True)}
    marks = dict(zip(entries, styles(list(entries.values())), strict=True))
    for panel, (title, key, part) in zip(axes, scores, strict=True):
        placed = [
            (row, marks[label])
            for row, label in zip(part, labels(part), strict=True)
            if row.get(f"{key} mean") is not None
        ]
        points = [(row[cost], 100 * row[f"{key} mean"]) for row, _ in placed]
        line = frontier(points, spreads([row for row, _ in placed], cost))
        panel.plot(*zip(*line, strict=True), color=PALE, linewidth=1, zorder=1, drawstyle="steps-post")
        log_axis(panel, [x for x, _ in points])
        for (row, mark), (_, y), x in zip(placed, points, side_by_side(panel, [x for x, _ in points]), strict=True):
            low, high = (100 * row[f"{key} {edge}"] for edge in ("low", "high"))
            panel.plot([x, x], [low, high], color=mark["color"], linewidth=0.8, alpha=0.5, zorder=2)
            panel.plot([x], [y], linestyle="none", markersize=4.5, zorder=3, **mark)
        panel.set_title(title, loc="left")
    lows = (row.get(f"{key} low") for _, key, part in scores for row in part)
    lowest = min(100 * low for low in lows if low is not None)
    axes[0].set_ylim(max(-3.0, lowest - 5), 104)
    figure.supxlabel(axis, fontsize=7.5)
    figure.supylabel("score, %", fontsize=7.5)
    handles = [Line2D([], [], linestyle="none", markersize=4.5, **mark) for mark in marks.values()]
    top_legend(figure, handles, list(entries), columnspacing=1.2, handletextpad=0.2)
    caption = (
        f"Score in % with 95 % intervals against {axis}. The grey line joins what no other system beats on both"
        f"{', times whose quartiles overlap being equal' if cost.endswith(' ms') else ''}. "
        f"Blue: SHIRG and its variants; black: {BASELINE}; hollow: another token budget than {BASELINE}. "
        "Systems with the same cost are drawn side by side." + doubts(known, cost)
    )
    return ReportFigure(name, f"Quality against {axis.split(' in ')[0]}", caption, figure)


def styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each system's marker: colour by family, shape by number within it, hollow for another budget."""
    seen: Counter[str] = Counter()
    marks = []
    for row in rows:
        tone = colour(row)
        marks.append(
            {
                "color": tone,
                "marker": MARKERS[seen[tone] % len(MARKERS)],
                "markerfacecolor": PAPER if unequal(row) else tone,
                "label": None,
            }
        )
        seen[tone] += 1
    return marks


def side_by_side(panel: Axes, values: Sequence[float]) -> list[float]:
    """x positions; equal ones are moved apart by 1 to 2 % of the axis, together by at most 6 %."""
    axis = panel.get_xaxis_transform()
    positions = [float(axis.transform((value, 0))[0]) for value in values]
    width = panel.bbox.width
    groups: dict[int, list[int]] = {}
    for i, position in enumerate(positions):
        groups.setdefault(round(position / (0.005 * width)), []).append(i)
    for members in groups.values():
        step = min(0.022, 0.06 / max(1, len(members) - 1)) * width
        for number, i in enumerate(members):
            positions[i] += (number - (len(members) - 1) / 2) * step
    inverse = axis.inverted()
    return [float(inverse.transform((position, 0))[0]) for position in positions]


def spreads(rows: Sequence[Row], cost: str) -> list[tuple[float, float]]:
    """Between what each row's cost may lie: the quartiles of a time, or anything for one without; else the cost."""
    if not cost.endswith(" ms"):
        return [(row[cost], row[cost]) for row in rows]
    known = [(row.get(f"{cost} q1"), row.get(f"{cost} q3")) for row in rows]
    return [(0.0, math.inf) if low is None or high is None else (low, high) for low, high in known]


def frontier(
    points: Sequence[tuple[float, float]], between: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The points that are better than every cheaper one, from cheap to expensive.

    Args:
        between: the range of each point's cost. Where two ranges overlap neither point is the cheaper one.
    """
    best: list[tuple[float, float]] = []
    highest = 0.0
    for (x, y), (low, high) in sorted(zip(points, between, strict=True), key=lambda pair: (pair[0][0], -pair[0][1])):
        if best and y <= best[-1][1]:
            continue
        if best and low <= highest:
            best.pop()
        best.append((x, y))
        highest = high
    return best
