"""Figures: all that a study allows, the same bytes every time."""

import json
import re
from pathlib import Path

from PIL import Image

from experiments.analysis.columns import columns
from experiments.analysis.study import read_study
from experiments.analysis.table import collect, read_study_table
from experiments.jobs.results import VERSION
from experiments.report.figure_style import ACCENT, INK
from experiments.report.figures import budget_curve, draw, stages, training
from experiments.report.publish import publish
from experiments.report.system_styles import SystemStyles

FIGURES = {
    "scores",
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


def test_every_figure_is_there_in_three_formats_at_paper_width(study: Path) -> None:
    for kind in ("svg", "png", "pdf"):
        assert {path.stem for path in (study / "figures").glob(f"*.{kind}")} == FIGURES
    for path in (study / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 5.5 * 300
    for path in (study / "figures").glob("*.pdf"):
        size = re.search(rb"/MediaBox \[ 0 0 ([0-9.]+) ", path.read_bytes())
        assert size is not None and float(size[1]) == 5.5 * 72
    page = (study / "report.html").read_text()
    assert all(f'id="figure-{name}"' in page for name in FIGURES)
    drawn = (study / "figures" / "latency.svg").read_text()
    assert re.search(r">shirg 40</", drawn), "text stays text"
    assert "#1b1f24" in drawn and "var(--ink)" not in drawn
    assert "#1b1f24" not in page.split("<main>")[1] and "var(--ink)" in page.split("<main>")[1]


def test_figures_are_the_same_bytes_every_time(study: Path) -> None:
    for one in draw(read_study_table(study)):
        assert one.svg == (study / "figures" / f"{one.name}.svg").read_text(), one.name
        assert one.pdf == (study / "figures" / f"{one.name}.pdf").read_bytes(), one.name


def test_the_totals_of_latency_are_those_of_the_table(study: Path) -> None:
    rows = [row for row in collect(study) if row["status"] == "ok"]
    drawn = stages(rows)
    assert drawn is not None
    (panel,) = drawn.figure.axes
    totals = next(column for column in columns(rows) if column.title == "total ms")
    assert [text.get_text().strip() for text in panel.texts] == [cell.main for cell in totals.cells]
    ticks = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "|"]
    assert ticks == [row["total ms"] for row in rows]
    assert re.search(r"<title>full: [\d.]+ ms in all", drawn.svg) and re.search("<title>full: tower ", drawn.svg)


def test_curves_are_named_by_what_tells_them_apart() -> None:
    share = {
        "dataset": "d",
        "metric": "m",
        "metrics": "m",
        "note": "",
        "changes": "data.n=24",
        "m mean": 0.5,
        "m low": 0.4,
        "m high": 0.6,
    }
    rows = [
        share | {"job": f"{selector} {tokens}", "selector": selector, "budget": tokens, "visual tokens mean": tokens}
        for selector in ("random", "shirg")
        for tokens in (40.0, 20.0)
    ]
    drawn = budget_curve(rows, SystemStyles(rows))
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
    drawn = training(read_study(tmp_path), SystemStyles([], ["pooled", "shirg"]))
    assert drawn is not None
    loss, accuracy = drawn.figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("loss", "accuracy")
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert accuracy.get_ylim()[1] < 0.6, "as high as the values, not up to 1"
    assert [line.get_color() for line in loss.lines] == [INK, ACCENT]
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10, 2.5], [20, 1.5]], [[10, 2.0], [20, 1.0]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[10, 0.1]], [[10, 0.2], [20, 0.5]]]
    assert publish(tmp_path) == [tmp_path / "report.html"]
    page = (tmp_path / "report.html").read_text()
    assert 'id="figure-training"' in page and ">selector-shirg</text>" in page and '<section id="results"' not in page
