"""Cells and columns: numbers and texts in parts, and which values are the better ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.analysis.columns import Cell, Column, columns, delta_cell, score_cell
from experiments.analysis.rows import flags
from experiments.analysis.table import markdown, records, refresh
from experiments.report.figures import stages
from tests.experiments.conftest import result_of
from tests.experiments.planting import change_result

Eval = Callable[..., Path]
SEEDS = {"mean": 0.5, "low": 0.41, "high": 0.6, "between": 0.02}


def named(name: str, **values: float) -> dict[str, float]:
    return {f"{name} {key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    ("cell", "parts", "text"),
    [
        (score_cell(named("m", **SEEDS), "m"), ("50.0", "± 2.0", ("41.0", "60.0"), ""), "50.0 ± 2.0 [41.0, 60.0]"),
        (
            score_cell(named("m", mean=0.5, low=0.4, high=0.6, ceiling=8.0), "m"),
            ("50.0", "", ("40.0", "60.0"), " of 800.0"),
            "50.0 [40.0, 60.0] of 800.0",
        ),
        (
            delta_cell(named("delta vs b", **SEEDS) | {"delta vs b p holm": 0.01}, "vs b"),
            ("+50.0", "", ("+41.0", "+60.0"), "*"),
            "+50.0 [+41.0, +60.0]*",
        ),
        (delta_cell({}, "vs b"), ("-", "", None, ""), "-"),
    ],
)
def test_a_cell_has_its_numbers_and_its_text_in_parts(
    cell: Cell, parts: tuple[str, str, tuple[str, str] | None, str], text: str
) -> None:
    assert (cell.main, cell.spread, cell.interval, cell.tail) == parts and cell.text == text
    if parts[2] is not None:
        assert (cell.value, cell.low, cell.high) == pytest.approx((50.0, cell.low, 60.0))


def test_which_values_are_better_does_not_depend_on_the_title() -> None:
    """A group of questions may be called "10 ms" or "cats vs dogs"."""
    cells = [Cell("1", 1.0), Cell("3", 3.0), Cell("2", 2.0)]
    for title in ("score", "10 ms", "x MiB", "cats vs dogs"):
        assert Column(title, "score", cells, "higher").best([True] * 3) == {1}
        assert Column(title, "cost", cells, "lower").best([True] * 3) == {0}
        assert Column(title, "count", cells).best([True] * 3) == set()
    column = Column("score", "score", cells, "higher")
    assert column.best([True, False, True]) == {2} and column.best([False, True, False]) == set()
    times = [Cell("2", 2.0, quartiles=(1.9, 2.2)), Cell("3", 3.0, quartiles=(2.3, 3.4))]
    measured = Column("ms", "cost", times, "lower", measured=True)
    assert measured.best([True] * 2) == {0}
    overlapping = [times[0], replace(times[1], quartiles=(2.1, 3.4))]
    assert replace(measured, cells=overlapping).best([True] * 2) == set(), "no faster than the spread"
    assert replace(measured, cells=cells).best([True] * 3) == set(), "without a known spread no time is the best"
    tied = replace(column, cells=[*cells, Cell("3", 3.0), Cell()])
    assert tied.best([True] * 5) == {1, 3}
    assert replace(column, cells=[Cell("0.0", 0.0)] * 3).best([True] * 3) == set(), "where all are equal none is best"


def test_every_column_of_a_study_has_its_direction(eval_here: Eval) -> None:
    eval_here("selector=pooled", "limit=12")
    job = eval_here("selector=random", "limit=12")
    times = result_of(job)["times"]
    change_result(job, times=times | {"peak_memory_mib": 9.0})
    shown = {column.title: column.better for column in columns(records(refresh(job.parent).frame))}
    assert {title for title, better in shown.items() if better == "lower"} == {
        *(f"{stage} ms" for stage in ("select", "prefill", "denoise", "total")),
        "peak MiB",
    }
    assert {"fine sparse", "guard dense", "fine vs pooled", "recall"} <= {t for t, b in shown.items() if b == "higher"}
    assert all(shown[title] is None for title in ("system", "n", "visual tokens", "prefix tokens", "status"))


def test_a_suspicious_time_is_shown_with_its_flag(eval_here: Eval) -> None:
    eval_here("selector=random", "limit=6")
    job = eval_here("selector=pooled", "limit=6")
    times = result_of(job)["times"]
    times["ms_per_sample"]["denoise"] = 0.0123
    times["flags"] = {"denoise ms": "0.0123 ms is below the floor of 0.02 ms"}
    change_result(job, times=times)
    frame = refresh(job.parent).frame
    row, other = sorted(records(frame), key=lambda row: row["selector"])
    assert flags(row)["denoise ms"] == times["flags"]["denoise ms"] and "total ms" in flags(row)
    shown = {column.title: column for column in columns([row, other])}
    assert shown["denoise ms"].texts == ["0.01!", f"{other['denoise ms']:.2f}"]
    assert shown["denoise ms"].cells[0].hint == times["flags"]["denoise ms"]
    assert shown["total ms"].texts[0] == f"{row['total ms']:.2f}!"
    assert "below the floor of 0.02 ms" in shown["flags"].texts[0]
    assert shown["denoise ms"].best([True, True]) == set(), "a suspicious value is not the best, nor is one alone"
    assert ",0.0123," in (job.parent / "table.csv").read_text()
    text = markdown([row, other])
    assert "0.01!" in text and "!: faster or smaller than the device allows, see flags." in text
    assert "impossible" not in text
    figure = stages([row, other])
    assert figure is not None and figure.caption.endswith(
        "Suspicious (!): pooled: one of its stages is below its floor."
    )
