"""Quality against a cost: every system with its interval, and the line of those that no other system beats on both."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from experiments.analysis.columns import doubts, headlines
from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row
from experiments.analysis.system_names import labels
from experiments.report.figure_style import (
    MOST_PANELS,
    PALE,
    ReportFigure,
    log_axis,
    panels,
    top_legend,
    with_tip,
)
from experiments.report.system_styles import SystemStyle, SystemStyles

PANEL = 1.75
"""Inches: the height of a panel."""
MOST_LABELLED = 12
"""Systems that are named beside each panel; more are named once, above."""
LABEL = 0.11
"""Inches of the height of a name beside a panel."""
INTERVAL: dict[str, Any] = {"linewidth": 0.8, "marker": "_", "markersize": 6, "markeredgewidth": 0.8}
FRAME = 0.42
"""Inches of the height of a panel beside its axes: title and ticks."""
TOP = 104.0
"""Upper end of the axis of scores, in %."""


def pareto(rows: Sequence[Row], styles: SystemStyles, cost: str, axis: str, name: str) -> ReportFigure | None:
    """Quality against a cost. Every point is where its values are; names beside a panel are moved apart instead."""
    known = [row for row in rows if row.get(cost) is not None]
    scores = headlines(known)[:MOST_PANELS]
    if not scores or len(known) < 2:
        return None
    names = dict(zip((row["job"] for row in known), labels(known, with_data=False), strict=True))
    entries = {names[row["job"]]: styles.of(row) for _, _, part in scores for row in part}
    named_beside = len(entries) <= MOST_LABELLED
    height = max(PANEL, 0.7 + LABEL * len(entries)) if named_beside else PANEL
    figure, axes = panels(len(scores), 2, height, share_y=True)
    lows = (row.get(f"{key} low") for _, key, part in scores for row in part)
    lowest = max(-3.0, min(100 * low for low in lows if low is not None) - 5)
    axes[0].set_ylim(lowest, TOP)
    for panel, (title, key, part) in zip(axes, scores, strict=True):
        placed = [row for row in part if row.get(f"{key} mean") is not None]
        points = [(row[cost], 100 * row[f"{key} mean"]) for row in placed]
        line = frontier(points, spreads(placed, cost))
        panel.plot(*zip(*line, strict=True), color=PALE, linewidth=1, zorder=1, drawstyle="steps-post")
        log_axis(panel, [x for x, _ in points])
        for row, (x, y) in zip(placed, points, strict=True):
            style = styles.of(row)
            low, high = (100 * row[f"{key} {edge}"] for edge in ("low", "high"))
            # The ends are wider than the point, so that an interval shorter than it is seen.
            panel.plot([x, x], [low, high], color=style.colour, zorder=2, **INTERVAL)
            (point,) = panel.plot([x], [y], markersize=4.5, zorder=3, **style.point)
            with_tip(point, f"{names[row['job']]}: {y:.1f} % [{low:.1f}, {high:.1f}], {x:.3g} {axis}")
        if named_beside:
            heights = apart([y for _, y in points], LABEL / (height - FRAME) * (TOP - lowest), TOP)
            for row, y in zip(placed, heights, strict=True):
                _name_beside(panel, y, names[row["job"]], styles.of(row))
        panel.set_title(title, loc="left")
    figure.supxlabel(axis, fontsize=7.5)
    figure.supylabel("score, %", fontsize=7.5)
    if not named_beside:
        handles = [Line2D([], [], markersize=4.5, **style.point) for style in entries.values()]
        top_legend(figure, handles, list(entries), columnspacing=1.2, handletextpad=0.2)
    caption = (
        f"Score in % with 95 % intervals against {axis}. The grey line joins what no other system beats on both"
        f"{', times whose quartiles overlap or are unknown being equal' if cost.endswith(' ms') else ''}. "
        f"Hollow: another token budget than {BASELINE}."
        f"{' Beside each panel the systems, the best on top.' if named_beside else ''}"
        f"{doubts(known, cost)}"
    )
    return ReportFigure(name, f"Quality against {axis.split(' in ')[0]}", caption, figure)


def _name_beside(panel: Axes, y: float, name: str, style: SystemStyle) -> None:
    """A system's marker and name to the right of a panel."""
    beside = blended_transform_factory(panel.transAxes, panel.transData)
    panel.plot([1.05], [y], transform=beside, clip_on=False, markersize=3.5, **style.point)
    panel.text(1.09, y, name, transform=beside, va="center", fontsize=6, color=style.colour)


def apart(values: Sequence[float], gap: float, high: float) -> list[float]:
    """The values, in their order, moved up to have at least a gap between each two, and down where `high` ends that."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = list(values)
    for before, i in itertools.pairwise(order):
        found[i] = max(found[i], found[before] + gap)
    limit = high
    for i in reversed(order):
        found[i] = min(found[i], limit)
        limit = found[i] - gap
    return found


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
