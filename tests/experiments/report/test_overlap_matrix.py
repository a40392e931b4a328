"""The matrix of overlaps: measured values below the diagonal, those by chance above it."""

from pathlib import Path

from experiments.analysis.rows import Row
from experiments.analysis.table import read_table, records
from experiments.report.overlap_matrix import MOST, overlap_matrix

COMMON: Row = {"dataset": "d", "data": "d", "budget": "80", "changes": "", "note": "", "selector": "x"}


def systems(*names: str, **overlaps: tuple[float, float | None]) -> list[Row]:
    """Rows with the overlaps `first_second=(mean, chance)`."""
    rows = {name: COMMON | {"job": name, "selector": name} for name in names}
    for pair, (mean, chance) in overlaps.items():
        one, other = pair.split("_")
        for ours, theirs in ((one, other), (other, one)):
            values = {"mean": mean, "chance": chance, "n": 6}
            rows[ours] |= {f"overlap {theirs} {key}": value for key, value in values.items()}
    return list(rows.values())


def test_every_pair_is_there_twice_measured_and_by_chance() -> None:
    drawn = overlap_matrix(systems("a", "b", "c", a_b=(0.5, 0.14), b_c=(0.254, None)))
    assert drawn is not None
    (panel,) = drawn.figure.axes
    cells = {text.get_position(): text.get_text() for text in panel.texts}
    assert cells == {(0, 1): "50", (1, 0): "14", (1, 2): "25", (2, 1): "-", (0, 2): "-", (2, 0): "-"}
    shades = {patch.get_xy(): patch.get_alpha() for patch in panel.patches if patch.get_alpha() is not None}
    assert shades == {(-0.5, 0.5): 1.0, (0.5, 1.5): 0.254 / 0.5}
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b", "c"]
    assert "Samples of each pair: 6." in drawn.caption


def test_a_system_without_overlap_is_left_out() -> None:
    drawn = overlap_matrix(systems("a", "pooled", "b", a_b=(0.0, 0.1)))
    assert drawn is not None
    (panel,) = drawn.figure.axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "b"]
    assert {text.get_text() for text in panel.texts} == {"0", "10"}
    assert overlap_matrix(systems("a", "b")) is None and overlap_matrix([]) is None


def test_many_systems_fit_and_the_rest_is_counted() -> None:
    names = [f"s{i}" for i in range(MOST + 2)]
    pairs = {f"{names[0]}_{name}": (0.3, 0.2) for name in names[1:]}
    drawn = overlap_matrix(systems(*names, **pairs))
    assert drawn is not None and "; 2 more do not fit." in drawn.caption
    (panel,) = drawn.figure.axes
    numbers = [text for text in panel.texts if text.get_text() == "30"]
    assert len(numbers) == MOST - 1
    cell = panel.get_window_extent().width / MOST
    assert max(text.get_window_extent().width for text in numbers) < cell


def test_the_published_study_shows_it_and_the_columns(study: Path) -> None:
    rows = [row for row in records(read_table(study)) if row["status"] == "ok"]
    drawn = overlap_matrix(rows)
    assert drawn is not None
    (panel,) = drawn.figure.axes
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert len(names) == 5 and not any("pooled" in name for name in names)
    page = (study / "report.html").read_text()
    for title in ("coverage", "gini", "position gini", "most alike"):
        assert f'detail" data-kind="{"text" if title == "most alike" else "cost"}"' in page
        assert f'data-title="{title}"' in page
        assert title not in (study / "table.md").read_text()
        assert title not in (study / "table.tex").read_text()
    stored = (study / "table.json").read_text()
    assert '"coverage mean"' in stored and '"position gini"' in stored and " chance" in stored
