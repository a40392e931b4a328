"""How rows are shown to people: which columns, in which words."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.study.rows import BASELINE, Row

_STAGES = ("select", "prefill", "cache", "denoise", "total")


@dataclass(frozen=True)
class Column:
    """A column of the table that people read."""

    title: str
    cells: list[str]

    @property
    def numeric(self) -> bool:
        return self.title not in ("selector", "data", "changes", "status", "note")


def columns(rows: Sequence[Row]) -> list[Column]:
    """What table.md and the terminal show; a column that says nothing is left out."""
    subsets = list(
        dict.fromkeys(k[:-5] for row in rows for k in row if k.startswith("subset ") and k.endswith(" mean"))
    )
    shown = [
        Column("selector", [str(row["selector"]) for row in rows]),
        Column("data", [str(row["dataset"] or row["data"]) for row in rows]),
        Column("budget", [str(row["budget"]) for row in rows]),
        Column("changes", [row["changes"] for row in rows]),
        Column("n", [_count(row["n"]) for row in rows]),
    ]
    for name in subsets:
        shown.append(Column(name.removeprefix("subset "), [_interval(row, name) for row in rows]))
    whole = [{} if any(f"{name} mean" in row for name in subsets) else row for row in rows]
    for metric in dict.fromkeys(metric for row in whole for metric in row.get("metrics", "").split()):
        shown.append(Column(metric, [_interval(row, metric) for row in whole]))
    shown += [Column(name, [_difference(row, name) for row in rows]) for name in _differences(rows)]
    shown.append(Column("recall", [_percent(row.get("recall mean")) for row in rows]))
    shown.append(Column("visual tokens", [_range(row, "visual tokens") for row in rows]))
    shown.append(Column("cache tokens", [_range(row, "cache tokens") for row in rows]))
    shown.append(Column("prefix tokens", [_range(row, "prefix tokens") for row in rows]))
    shown += [Column(f"{stage} ms", [_ms(row.get(f"{stage} ms")) for row in rows]) for stage in _STAGES]
    shown.append(Column("peak MiB", [_count(row["peak memory MiB"]) for row in rows]))
    shown.append(Column("trained parameters", [_count(row["trainable parameters"] or None) for row in rows]))
    shown.append(Column("status", [row["status"] for row in rows]))
    shown.append(Column("note", ["; ".join(filter(None, (row["reason"], row["note"]))) for row in rows]))
    # What all rows share needs no column; the legend says it once.
    failed = any(row["reason"] for row in rows)
    sayable = ("data", "changes") if failed else ("data", "changes", "note")
    shared = [c for c in shown if c.title in sayable and len(set(c.cells)) == 1]
    return [column for column in shown if column not in shared and any(cell not in ("", "-") for cell in column.cells)]


def markdown(rows: Sequence[Row]) -> str:
    """The table for a README or an issue."""
    shown = columns(rows)
    lines = [
        " | ".join(column.title for column in shown),
        " | ".join("---:" if column.numeric else "---" for column in shown),
        *(" | ".join(_escape(column.cells[i]) for column in shown) for i in range(len(rows))),
    ]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{legend(rows)}\n"


def legend(rows: Sequence[Row]) -> str:
    """What all rows share, and what the cells mean."""
    metrics = ", ".join(dict.fromkeys(row["metric"] for row in rows if row["metric"])) or "scores"
    shared = [values.pop() for k in ("dataset", "changes", "note") if len(values := {row[k] for row in rows}) == 1]
    common = "; ".join(text for text in shared if text)
    return (f"All rows: {common}. " if common else "") + (
        f"Scores and recall in % [95 % interval; pictures are resampled where questions share one]; groups and "
        f"differences: {metrics}; vs {BASELINE}: paired on the same samples, in points; ms: median per sample."
    )


def _interval(row: Row, name: str) -> str:
    if row.get(f"{name} mean") is None:
        return "-"
    mean, low, high = (100 * row[f"{name} {key}"] for key in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _differences(rows: Sequence[Row]) -> list[str]:
    """Differences by group where there are groups: over all samples they would mix what should be told apart."""
    names = [k[6:-5] for row in rows for k in row if k.startswith("delta ") and k.endswith(" mean")]
    by_group = [name for name in dict.fromkeys(names) if not name.startswith("vs ")]
    return by_group or list(dict.fromkeys(names))


def _difference(row: Row, name: str) -> str:
    if row.get(f"delta {name} mean") is None:
        return "-"
    mean, low, high = (100 * row[f"delta {name} {key}"] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _range(row: Row, name: str) -> str:
    if row.get(f"{name} mean") is None:
        return "-"
    low, high = row[f"{name} min"], row[f"{name} max"]
    return str(low) if low == high else f"{row[f'{name} mean']:.0f} ({low}-{high})"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
