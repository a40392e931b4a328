"""Figures: all that a study allows, the same bytes every time."""

import json
import re
from pathlib import Path

from PIL import Image

from experiments.analysis.study import read_study
from experiments.analysis.table import read_study_table
from experiments.jobs.results import VERSION
from experiments.report.figures import budget_curve, draw, training
from experiments.report.pareto import frontier, spreads
from experiments.report.publish import publish

FIGURES = {
    "pareto_latency",
    "pareto_tokens",
    "differences",
    "ablations",
    "budget_curve",
    "latency",
    "memory",
    "overlap",
    "tokens",
}


def test_every_figure_is_there_in_both_formats_at_paper_width(study: Path) -> None:
    for kind in ("svg", "png"):
        assert {path.stem for path in (study / "figures").glob(f"*.{kind}")} == FIGURES
    for path in (study / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 5.5 * 300
    page = (study / "report.html").read_text()
    assert all(f'id="figure-{name}"' in page for name in FIGURES)
    drawn = (study / "figures" / "latency.svg").read_text()
    assert re.search(r">shirg 40</", drawn), "text stays text"
    assert "#1b1f24" in drawn and "var(--ink)" not in drawn
    assert "#1b1f24" not in page.split("<main>")[1] and "var(--ink)" in page.split("<main>")[1]


def test_figures_are_the_same_bytes_every_time(study: Path) -> None:
    for one in draw(read_study_table(study)):
        assert one.svg == (study / "figures" / f"{one.name}.svg").read_text(), one.name


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


def test_curves_are_named_by_what_tells_them_apart() -> None:
    share = {"dataset": "d", "metric": "m", "metrics": "m", "note": "", "m mean": 0.5, "m low": 0.4, "m high": 0.6}
    rows = [
        share | {"selector": selector, "changes": "data.n=24", "visual tokens mean": tokens}
        for selector in ("random", "shirg")
        for tokens in (40.0, 20.0)
    ]
    drawn = budget_curve(rows)
    assert drawn is not None
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == ["random", "shirg"]
    assert drawn.figure.axes[0].lines[0].get_xdata().tolist() == [20.0, 40.0]


def test_a_study_of_trainings_alone_shows_their_curves(tmp_path: Path) -> None:
    assert publish(tmp_path / "nothing") == []
    for selector, rows in (("pooled", "10,2.5,0.1\n20,1.5,\n"), ("shirg", "10,2.0,0.2\n20,1.0,0.5\n")):
        job = tmp_path / f"train_selector-{selector}"
        job.mkdir()
        record = {"version": VERSION, "verb": "train", "status": "running", "choices": {"selector": selector}}
        (job / "result.json").write_text(json.dumps(record))
        (job / "metrics.csv").write_text(f"step,loss,accuracy\n{rows}")
    drawn = training(read_study(tmp_path))
    assert drawn is not None
    loss, accuracy = drawn.figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("loss", "accuracy")
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10, 2.5], [20, 1.5]], [[10, 2.0], [20, 1.0]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[10, 0.1]], [[10, 0.2], [20, 0.5]]]
    assert publish(tmp_path) == [tmp_path / "report.html"]
    page = (tmp_path / "report.html").read_text()
    assert 'id="figure-training"' in page and ">selector-shirg</text>" in page and '<section id="results"' not in page
