"""The verdict says what the tests say, and no more."""

from typing import Any

from experiments.analysis.rows import Row
from experiments.report.verdict import heading, origin, verdict


def system(
    selector: str, *, dataset: str = "d", note: str = "", ratio: float = 1.0, **groups: tuple[float, float]
) -> Row:
    """A row with (difference in points, p after Holm) by group; `all` for all questions."""
    row: Row = {"job": f"{selector} {dataset}", "selector": selector, "changes": "", "dataset": dataset, "note": note}
    row |= {"data": dataset, "budget": "80", "limited": False, "n": 96, "metric": "m", "status": "ok", "m mean": 0.5}
    row["budget ratio"] = ratio
    for group, (points, p) in groups.items():
        name = "delta vs pooled" if group == "all" else f"delta {group} vs pooled"
        row |= {f"{name} mean": points / 100, f"{name} low": points / 100 - 0.05, f"{name} high": points / 100 + 0.05}
        row[f"{name} p holm"] = p
    return row


def test_a_significant_and_an_insignificant_difference_are_told_apart() -> None:
    rows = [
        system("pooled"),
        system("random", fine=(-12.0, 0.01), guard=(1.0, 0.9)),
        system("shirg", fine=(28.9, 0.0001), guard=(-0.5, 0.8)),
        system("topv", fine=(9.0, 0.04), guard=(-9.0, 0.03)),
    ]
    assert verdict(rows) == (
        "Compared to pooled, shirg scores 28.9 points higher on fine questions (95 % interval +23.9 to +33.9, "
        "p < 0.001) and not significantly different on guard questions (-0.5, -5.5 to +4.5, p = 0.800). "
        "Of 2 other systems compared to pooled by paired tests: 1 significantly better and 1 worse on fine questions, "
        "0 significantly better and 1 worse on guard questions."
    )


def test_a_large_difference_that_no_test_supports_is_no_result() -> None:
    said = verdict([system("pooled"), system("shirg", all=(40.0, 0.06), ratio=3.8)])
    assert said == (
        "Compared to pooled, with 3.8 times its tokens, shirg scores not significantly different (+40.0, +35.0 to "
        "+45.0, p = 0.060)."
    )
    worse = verdict([system("pooled"), system("shirg", all=(-7.0, 0.049))])
    assert "7.0 points lower (95 % interval -12.0 to -2.0, p = 0.049)" in worse and "higher" not in worse


def test_of_several_datasets_none_is_picked() -> None:
    rows = [system(name, dataset=data, all=(30.0, 0.001)) for name in ("shirg", "topv") for data in ("d", "e")]
    rows[1] = system("shirg", dataset="e", all=(-3.0, 0.7))
    assert verdict([system("pooled"), system("pooled", dataset="e"), *rows]) == (
        "Of 4 systems compared to pooled by paired tests: 3 significantly better and 0 worse."
    )


def test_without_a_test_nothing_is_claimed() -> None:
    assert verdict([]) == ""
    assert verdict([system("shirg")]) == "One system was evaluated, so nothing is compared."
    assert verdict([system("shirg"), system("topv")]).startswith("No system is compared")
    untrained = [system("pooled", note="untrained model"), system("shirg", note="untrained model", all=(9.0, 0.01))]
    assert verdict(untrained) == "The model is untrained, so its scores say nothing about the selectors."


def result(model: str, n: int, **environment: object) -> dict[str, Any]:
    return {
        "status": "ok",
        "choices": {"model": model},
        "data": {"name": "docvqa", "split": "val", "n": n, "of": 5349},
        "times": {"finished": "2026-11-02T09:00:00+00:00"},
        "environment": {"git": "2bedc85c0ffee", "git_dirty": False} | environment,
    }


def test_the_heading_names_model_data_date_and_commit() -> None:
    results = [result("lavida_8b", 5349), result("lavida_8b", 5349)]
    assert heading(results) == "lavida_8b on docvqa, val, 5349 samples"
    assert origin(results) == "2 November 2026, commit 2bedc85"
    results.append(result("tiny", 100, git_dirty=True))
    assert heading(results) == "lavida_8b; tiny on docvqa, val, 5349 samples; docvqa, val, 100 of 5349 samples"
    assert origin(results).endswith("commit 2bedc85; 2bedc85 with local changes")
    assert heading([]) == origin([]) == ""
