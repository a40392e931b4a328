"""What stands at the top of the page: what the study is about, and what its own tests say, in one or two sentences."""

from collections.abc import Sequence
from datetime import datetime

from experiments.analysis.columns import differences, p_value
from experiments.analysis.paired import BASELINE, other_name
from experiments.analysis.rows import Row, our_row
from experiments.analysis.stats import ALPHA
from experiments.analysis.system_names import labels
from experiments.analysis.systems import Result

MOST_NAMED = 3
"""Models or datasets that the heading names."""


def heading(results: Sequence[Result]) -> str:
    """The models and the data, for example "tiny on synth_glyphs, test, 576 samples"; "" without a finished job."""
    done = [result for result in results if result["status"] == "ok"]
    models = [str(result["choices"]["model"]) for result in done]
    data = [f"{r['data']['name']}, {r['data']['split']}, {_samples(r)}" for r in done if r.get("data")]
    return f"{_some(models)} on {_some(data)}" if data else _some(models)


def _samples(result: Result) -> str:
    n, of = result["data"]["n"], result["data"]["of"]
    return f"{n} samples" if n == of else f"{n} of {of} samples"


def _some(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    more = len(different) - MOST_NAMED
    return "; ".join(different[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def origin(results: Sequence[Result]) -> str:
    """When the last job ended, and at which commits, for example "26 November 2026, commit 2bedc85"."""
    done = [result for result in results if result["status"] == "ok"]
    if not done:
        return ""
    ended = datetime.fromisoformat(max(result["times"]["finished"] for result in done))
    return f"{ended.day} {ended:%B %Y}, commit {_some([commit(result) for result in done])}"


def commit(result: Result, digits: int = 7) -> str:
    env = result["environment"]
    return (env["git"] or "unknown")[:digits] + (" with local changes" if env["git_dirty"] else "")


def verdict(rows: Sequence[Row]) -> str:
    """What the paired tests to the baseline say, and nothing else.

    First our best system, where all rows are about one dataset, then how many of the others differ. Significant means
    p < 0.05 after Holm's correction over the systems, as the table's stars do.

    Args:
        rows: the finished rows over the same samples, those of the first part of the table.
    """
    if not rows:
        return ""
    if any("untrained model" in row["note"] for row in rows):
        return "The model is untrained, so its scores say nothing about the selectors."
    if len(rows) == 1:
        return "One system was evaluated, so nothing is compared."
    tests = [name for name in differences(rows) if other_name(name) == BASELINE]
    compared = [row for row in rows if any(row.get(f"delta {name} mean") is not None for name in tests)]
    if not compared:
        return f"No system is compared: none answered the same samples as {BASELINE}."
    # With several datasets the best of our rows would be the one on the easiest data.
    ours = our_row(compared) if len({row["dataset"] for row in compared}) == 1 else None
    others = [row for row in compared if row is not ours]
    names = dict(zip((row["job"] for row in rows), labels(rows), strict=True))
    sentences = [_about(ours, names[ours["job"]], tests)] if ours is not None else []
    if others:
        sentences.append(_about_others(others, tests, besides=ours is not None))
    return " ".join(sentences)


def _about(row: Row, name: str, tests: Sequence[str]) -> str:
    """One system's differences, the significant ones first."""
    known = [test for test in tests if row.get(f"delta {test} mean") is not None]
    parts = [_difference(row, test) for test in sorted(known, key=lambda test: -abs(_direction(row, test)))]
    ratio = row.get("budget ratio")
    tokens = "" if ratio in (None, 1.0) else f", with {ratio:.2g} times its tokens"
    return f"Compared to {BASELINE}{tokens}, {name} scores {_joined(parts)}."


def _difference(row: Row, test: str) -> str:
    low, mean, high = (100 * row[f"delta {test} {key}"] for key in ("low", "mean", "high"))
    p = p_value(row[f"delta {test} p holm"])
    if direction := _direction(row, test):
        how = "higher" if direction > 0 else "lower"
        return f"{abs(mean):.1f} points {how}{_where(test)} (95 % interval {low:+.1f} to {high:+.1f}, {p})"
    return f"not significantly different{_where(test)} ({mean:+.1f}, {low:+.1f} to {high:+.1f}, {p})"


def _direction(row: Row, test: str) -> int:
    """1 for a significantly higher score, -1 for a lower one, 0 for a difference that is not significant."""
    if row.get(f"delta {test} mean") is None or row[f"delta {test} p holm"] >= ALPHA:
        return 0
    return 1 if row[f"delta {test} mean"] > 0 else -1


def _about_others(rows: Sequence[Row], tests: Sequence[str], *, besides: bool) -> str:
    """How many systems differ significantly, test by test."""
    parts = []
    for test in tests:
        directions = [_direction(row, test) for row in rows if row.get(f"delta {test} mean") is not None]
        parts.append(f"{directions.count(1)} significantly better and {directions.count(-1)} worse{_where(test)}")
    number = f"{len(rows)} {'other ' if besides else ''}system{'' if len(rows) == 1 else 's'}"
    return f"Of {number} compared to {BASELINE} by paired tests: {', '.join(parts)}."


def _where(test: str) -> str:
    """ " on fine questions" for "fine vs pooled"; nothing for all questions."""
    group = test.rpartition("vs ")[0].strip()
    return f" on {group} questions" if group else ""


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
