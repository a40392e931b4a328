"""What stands in one cell of a table: a row's figures in words, and the numbers that they are sorted by."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments.metrics import CLEAN
from experiments.study.rows import Row
from experiments.study.significance import stars


@dataclass(frozen=True)
class Cell:
    """What stands in the table, and what it is sorted by and drawn from."""

    text: str = "-"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    aside: str = ""
    """A remark that has no place in the cell itself."""


def seeds_cell(row: Row) -> Cell:
    n = len(row["seeds_cell"].split())
    return Cell(str(n), n) if n > 1 else Cell()


def n_cell(row: Row) -> Cell:
    """The number of questions, and of how many where they are a part."""
    cell = count_cell(row["n"])
    return replace(cell, text=f"{cell.text} of {row['of']}") if row["limited"] and row["of"] else cell


def score_cell(row: Row, name: str) -> Cell:
    """A score; of cleaned answers the mean is enough, since they stand beside the raw ones and move with them."""
    cell = percent_cell(row.get(f"{name} mean")) if name.endswith(CLEAN) else _interval(row, name)
    top = row.get(f"{name} ceiling")
    return cell if top is None else replace(cell, text=f"{cell.text} of {percent_cell(top).text}")


def effect_cell(row: Row, name: str) -> Cell:
    """A difference within one system, between two kinds of question."""
    if row.get(f"{name} mean") is None:
        return Cell()
    mean, low, high = _points(row, name)
    return Cell(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", mean, low, high)


def _interval(row: Mapping[str, float], name: str) -> Cell:
    if row.get(f"{name} mean") is None:
        return Cell()
    mean, low, high = _points(row, name)
    between = row.get(f"{name} between")
    aside = "" if between is None else f"± {100 * between:.1f}"
    return Cell(" ".join(filter(None, (f"{mean:.1f}", aside, f"[{low:.1f}, {high:.1f}]"))), mean, low, high, aside)


def difference_cell(row: Row, name: str) -> Cell:
    if row.get(f"delta {name} mean") is None:
        return Cell()
    mean, low, high = _points(row, f"delta {name}")
    p = row[f"delta {name} p holm"]
    return Cell(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{stars(p)}", mean, low, high, p_value(p))


def _points(row: Mapping[str, float], name: str) -> tuple[float, float, float]:
    """Mean and interval of a share, from 0 to 100."""
    return 100 * row[f"{name} mean"], 100 * row[f"{name} low"], 100 * row[f"{name} high"]


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def percent_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{100 * value:.1f}", 100 * value)


def tokens_cell(row: Row, name: str) -> Cell:
    """A mean and its range; what decides the budget says how many times the baseline's it is, where that is not 1."""
    if row.get(f"{name} mean") is None:
        return Cell()
    text = range_cell(row, name).text
    decides = "visual tokens" if row.get("cache tokens mean") is None else "cache tokens"
    marked = f"{text} ({row['budget ratio']:.2g}x)" if unequal(row) and name == decides else text
    return Cell(marked, row[f"{name} mean"])


def range_cell(row: Row, name: str) -> Cell:
    if row.get(f"{name} mean") is None:
        return Cell()
    low, high, mean = row[f"{name} min"], row[f"{name} max"], row[f"{name} mean"]
    return Cell(str(low) if low == high else f"{mean:.{1 if high < 10 else 0}f} ({low}-{high})", mean)


def kib_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value / 1024:.1f}", value / 1024)


def drift_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.2g}", value)


def cost_cell(row: Row, name: str) -> Cell:
    value = row.get(name)
    if name in flags(row):
        return Cell("impossible", None, aside=flags(row)[name])
    if value is None:
        return Cell()
    fine = name.endswith(" ms")
    text = f"{value:.2f}" if fine and value < 10 else f"{value:.1f}" if fine and value < 100 else f"{value:.0f}"
    return Cell(text, value)


def count_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.0f}", value)


def unequal(row: Row) -> bool:
    """Whether a row has another token budget than what it is compared to."""
    return row.get("budget ratio") not in (None, 1.0)


def flags(row: Row) -> dict[str, str]:
    """Columns of a row whose figure cannot be, and why (experiments.roofline)."""
    return dict(flag.split(": ", 1) for flag in row["flags"].split("; ") if flag)
