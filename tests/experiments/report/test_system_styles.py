"""One colour and one marker for each system, in every figure."""

from pathlib import Path

from matplotlib.colors import to_hex

from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row
from experiments.analysis.system_names import labels
from experiments.analysis.table import collect, read_study_table
from experiments.report.figure_style import ACCENT, HUES, INK, SOFT, THEMED
from experiments.report.figures import draw, forest
from experiments.report.score_bars import score_bars
from experiments.report.system_styles import MARKERS, SystemStyles, selector_colours


def system(selector: str, changes: str = "", dataset: str = "d") -> Row:
    job = f"{selector} {changes} {dataset}"
    return {
        "job": job,
        "selector": selector,
        "changes": changes,
        "dataset": dataset,
        "data": dataset,
        "budget": "80",
    } | {
        "limited": False,
        "n": 8,
        "note": "",
    }


def test_a_selector_has_a_colour_and_a_system_a_marker() -> None:
    rows = [system(name) for name in ("pooled", "full", "saint", "shirg", "topv")] + [system("shirg", "adapter=own")]
    styles = SystemStyles(rows)
    assert [styles.of(row).colour for row in rows] == [INK, SOFT, HUES[0], ACCENT, HUES[1], ACCENT]
    assert len({styles.of(row).marker for row in rows}) == len(rows)


def test_one_system_on_two_datasets_has_one_style() -> None:
    rows = [system(name, dataset=data) for data in ("d", "e") for name in ("pooled", "saint", "topv")]
    styles = SystemStyles(rows)
    assert [styles.of(row) for row in rows[:3]] == [styles.of(row) for row in rows[3:]]


def test_many_systems_share_no_pair_of_colour_and_marker() -> None:
    rows = [system("shirg", f"selector.x={i}") for i in range(len(MARKERS))]
    rows += [system(f"rival{i}") for i in range(2 * len(HUES))]
    styles = SystemStyles(rows)
    assert len({(styles.of(row).colour, styles.of(row).marker) for row in rows}) == len(rows)
    assert selector_colours(["a", "b", "a", *"cdefghi"])["i"] == HUES[0], "used again from the ninth on"
    assert set(HUES) < set(THEMED), "the dark theme has its own"


def test_all_figures_of_a_study_agree(study: Path) -> None:
    rows = [row for row in collect(study) if row["status"] == "ok"]
    styles = SystemStyles(rows)
    names = labels(rows)
    bars, differences = score_bars(rows, styles), forest(rows, styles, BASELINE)
    assert bars is not None and differences is not None
    drawn = [to_hex(patch.get_facecolor()) for patch in bars.figure.axes[0].patches]
    assert drawn == [styles.of(row).colour for row in rows]
    compared = [label.get_text() for label in differences.figure.axes[0].get_yticklabels()]
    points = [line for line in differences.figure.axes[0].lines if line.get_marker() in MARKERS]
    by_name = dict(zip(names, map(styles.of, rows), strict=True))
    assert [(line.get_color(), line.get_marker()) for line in points] == [
        (by_name[name].colour, by_name[name].marker) for name in compared
    ]
    assert {figure.name for figure in draw(read_study_table(study))} > {"scores", "pareto_tokens", "differences"}


def test_bars_are_as_long_as_the_scores_and_say_what_is_left_of_full(study: Path) -> None:
    rows = [row for row in collect(study) if row["status"] == "ok"]
    for row, score in zip(rows, (0.5, 0.8, 0.25, 0.625, 0.125, 0.375), strict=True):
        row["subset fine sparse mean"] = score
    drawn = score_bars(rows, SystemStyles(rows))
    assert drawn is not None
    titles = [panel.get_title(loc="left") for panel in drawn.figure.axes]
    assert sorted(titles) == ["fine dense", "fine sparse", "guard dense", "guard sparse"]
    for panel, title in zip(drawn.figure.axes, titles, strict=True):
        means = [100 * row[f"subset {title} mean"] for row in rows]
        assert [patch.get_width() for patch in panel.patches] == means
        assert [text.get_text().strip() for text in panel.texts] == [f"{mean:.1f}" for mean in means]
    assert [row["selector"] for row in rows[:2]] == ["pooled", "full"]
    assert "<title>pooled: 50.0 %" in drawn.svg and ", 62 % of full</title>" in drawn.svg
