"""Quality against a cost: points in their places, names moved apart, and no line through what is equal."""

import itertools
from pathlib import Path

import numpy as np

from experiments.analysis.columns import headlines
from experiments.analysis.table import collect
from experiments.report.pareto import apart, frontier, pareto, spreads
from experiments.report.system_styles import MARKERS, SystemStyles


def test_every_point_and_every_interval_is_where_its_values_are(study: Path) -> None:
    rows = [row for row in collect(study) if row["status"] == "ok"]
    styles = SystemStyles(rows)
    for cost in ("visual tokens mean", "total ms"):
        drawn = pareto(rows, styles, cost, "cost", "name")
        assert drawn is not None
        for panel, (title, key, part) in zip(drawn.figure.axes, headlines(rows), strict=True):
            assert panel.get_title(loc="left") == title
            inside = [line for line in panel.lines if line.get_transform() == panel.transData]
            points = [line for line in inside if line.get_marker() in MARKERS]
            assert [line.get_xydata().tolist() for line in points] == [
                [[row[cost], 100 * row[f"{key} mean"]]] for row in part
            ]
            assert [line.get_color() for line in points] == [styles.of(row).colour for row in part]
            assert [line.get_marker() for line in points] == [styles.of(row).marker for row in part]
            intervals = [line.get_xydata().tolist() for line in inside if line.get_marker() == "_"]
            assert intervals == [
                [[row[cost], 100 * row[f"{key} low"]], [row[cost], 100 * row[f"{key} high"]]] for row in part
            ]


def test_names_stand_beside_a_panel_in_the_order_of_the_scores(study: Path) -> None:
    rows = [row for row in collect(study) if row["status"] == "ok"]
    drawn = pareto(rows, SystemStyles(rows), "visual tokens mean", "vision tokens", "name")
    assert drawn is not None
    panel = drawn.figure.axes[0]
    key = headlines(rows)[0][1]
    heights = [text.get_position()[1] for text in panel.texts]
    scores = [row[f"{key} mean"] for row in rows]
    assert [scores[i] for i in np.argsort(heights)] == sorted(scores)
    boxes = sorted((text.get_window_extent() for text in panel.texts), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 - 1 for below, above in itertools.pairwise(boxes)), "no name covers another"
    assert drawn.svg.count('class="tip"><title>') == len(rows) * len(drawn.figure.axes)


def test_values_are_moved_apart_and_stay_below_the_limit() -> None:
    assert apart([10.0, 50.0, 30.0], 5, 100) == [10.0, 50.0, 30.0]
    assert apart([50.0, 50.0, 10.0], 5, 100) == [50.0, 55.0, 10.0]
    assert apart([100.0, 99.0, 98.0], 5, 100) == [100.0, 95.0, 90.0]
    found = apart(np.linspace(90, 100, 9).tolist(), 4, 100)
    assert np.diff(found).min() >= 4 and max(found) == 100


def test_the_frontier_is_what_no_other_point_beats_on_both() -> None:
    points = [(1.0, 20.0), (2.0, 50.0), (2.0, 60.0), (3.0, 55.0), (4.0, 90.0), (9.0, 90.0)]
    assert frontier(points, [(x, x) for x, _ in points]) == [(1.0, 20.0), (2.0, 60.0), (4.0, 90.0)]


def test_a_frontier_has_no_step_between_times_that_overlap() -> None:
    points = [(1.0, 20.0), (1.1, 60.0), (2.0, 70.0), (2.1, 65.0)]
    assert frontier(points, [(0.9, 1.15), (1.0, 1.2), (1.9, 2.1), (2.0, 2.2)]) == [(1.1, 60.0), (2.0, 70.0)]
    row = {"total ms": 1.0, "total ms q1": 0.9, "total ms q3": 1.2, "visual tokens mean": 80.0}
    assert spreads([row, {"total ms": 1.0}], "total ms") == [(0.9, 1.2), (0.0, float("inf"))]
    assert spreads([row], "visual tokens mean") == [(80.0, 80.0)]
    unknown = [(0.0, float("inf"))] * len(points)
    assert frontier(points, unknown) == [(2.0, 70.0)], "without a known spread no time is the better one"
