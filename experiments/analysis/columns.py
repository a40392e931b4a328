"""What stands in one cell of a table: a row's figures in words, and the numbers that they are sorted by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.analysis.paired import BASELINE
from experiments.analysis.rows import Row
from experiments.analysis.stats import stars
from experiments.metrics import CLEAN


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
    n = len(row["seeds"].split())
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
    """Columns of a row whose figure cannot be, and why (experiments.profiling)."""
    return dict(flag.split(": ", 1) for flag in row["flags"].split("; ") if flag)


Kind = Literal["text", "count", "score", "difference", "cost"]
_STAGES = ("select", "prefill", "cache", "denoise", "total")


@dataclass(frozen=True)
class Column:
    """A column of the table that people read; scores and differences are in points, from 0 to 100."""

    title: str
    kind: Kind
    cells: list[Cell] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [cell.text for cell in self.cells]

    @property
    def numeric(self) -> bool:
        return self.kind != "text"


def columns(rows: Sequence[Row], among: Sequence[Row] | None = None) -> list[Column]:
    """What table.md and the terminal show; a column that says nothing is left out, and so is what all rows share:
    the legend says it once. `among`: the rows of the legend, where this table has a part of them."""
    common = shared(rows if among is None else among)
    said = set(common["changes"].split())
    changes = [" ".join(word for word in row["changes"].split() if word not in said) for row in rows]
    shown = [
        Column("selector", "text", [Cell(str(row["selector"])) for row in rows]),
        Column("data", "text", [Cell(_data(row)) for row in rows]),
        Column("budget", "count", [Cell(str(row["budget"])) for row in rows]),
        Column("changes", "text", [Cell(text) for text in changes]),
        Column("n", "count", [n_cell(row) for row in rows]),
        Column("seeds", "count", [seeds_cell(row) for row in rows]),
    ]
    shown += [Column(title, "score", [score_cell(row, key) for row in part]) for title, key, part in qualities(rows)]
    shown += [Column(name, "difference", [effect_cell(row, name) for row in rows]) for name in ("disc1", "disc2")]
    shown += [Column(name, "difference", [difference_cell(row, name) for row in rows]) for name in differences(rows)]
    shown.append(Column("recall", "score", [percent_cell(row.get("recall mean")) for row in rows]))
    for name in ("visual tokens", "cache tokens", "prefix tokens"):
        shown.append(Column(name, "cost", [tokens_cell(row, name) for row in rows]))
    if len({row.get("steps mean") for row in rows}) > 1:
        shown.append(Column("steps", "cost", [range_cell(row, "steps") for row in rows]))
    if any(row.get("drift") is not None for row in rows):
        shown.append(Column("cache KiB", "cost", [kib_cell(row.get("cache bytes")) for row in rows]))
        shown.append(Column("max logit drift", "cost", [drift_cell(row.get("drift")) for row in rows]))
        shown.append(Column("same top-1", "count", [percent_cell(row.get("same top1")) for row in rows]))
    shown += [Column(f"{stage} ms", "cost", [cost_cell(row, f"{stage} ms") for row in rows]) for stage in _STAGES]
    shown.append(Column("peak MiB", "cost", [cost_cell(row, "peak memory MiB") for row in rows]))
    shown.append(
        Column("trained parameters", "count", [count_cell(row["trainable parameters"] or None) for row in rows])
    )
    shown.append(Column("flags", "text", [Cell(row["flags"]) for row in rows]))
    shown.append(Column("status", "text", [Cell(row["status"]) for row in rows]))
    notes = ["; ".join(filter(None, (row["reason"], row["note"]))) for row in rows]
    shown.append(Column("note", "text", [Cell(note) for note in notes]))
    failed = any(row["reason"] or row["flags"] for row in rows)
    idle = {title for title in ("data", "note") if common[title] and not (title == "note" and failed)}
    return [c for c in shown if c.title not in idle and any(text not in ("", "-") for text in c.texts)]


def shared(rows: Sequence[Row]) -> dict[str, str]:
    """What all rows have in common of their data, overrides and notes; "" where that is nothing."""
    words = [row["changes"].split() for row in rows]
    found = {"changes": " ".join(word for word in words[0] if all(word in other for other in words)) if words else ""}
    for title, values in (("data", {_data(row) for row in rows}), ("note", {row["note"] for row in rows})):
        found[title] = (values.pop() or "") if len(values) == 1 else ""
    return found


def _data(row: Row) -> str:
    return str(row["dataset"] or row["data"])


def qualities(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Title, row key and rows of each score: by subset where a dataset has some, the metrics where it has none."""
    subsets = [k[:-5] for row in rows for k in row if k.startswith("subset ") and k.endswith(" mean")]
    found = [(name.removeprefix("subset "), name, list(rows)) for name in dict.fromkeys(subsets)]
    whole = [{} if any(f"{name} mean" in row for name in subsets) else row for row in rows]
    metrics = dict.fromkeys(metric for row in whole for metric in row.get("metrics", "").split())
    subtasks = dict.fromkeys(k[:-5] for row in whole for k in row if k.startswith("subtask ") and k.endswith(" mean"))
    found += [(metric, metric, whole) for metric in metrics]
    return [*found, *((name.removeprefix("subtask "), name, whole) for name in subtasks)]


def headlines(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Title, row key and rows of the scores that figures show: of each dataset its subsets, or else its headline."""
    found = []
    for dataset in (sets := list(dict.fromkeys(row["dataset"] for row in rows))):
        part = [row for row in rows if row["dataset"] == dataset]
        named = [(title, key) for title, key, _ in qualities(part) if key.startswith("subset ")]
        # A job that failed before its first answer has no metric to show.
        metrics = list(dict.fromkeys(row["metric"] for row in part if row["metric"]))[:1]
        for title, key in named or [(metric, metric) for metric in metrics]:
            found.append((f"{dataset}: {title}" if len(sets) > 1 else title, key, part))
    return found


def differences(rows: Sequence[Row]) -> list[str]:
    """Differences by group where there are groups: over all samples they would mix what should be told apart."""
    names = dict.fromkeys(k[6:-5] for row in rows for k in row if k.startswith("delta ") and k.endswith(" mean"))
    by_group = [name for name in names if not name.startswith("vs ")]
    return by_group or list(names)


def labels(rows: Sequence[Row]) -> list[str]:
    """A short name for each row that tells it from the others."""
    budgets: dict[str, set[str]] = {}
    for row in rows:
        budgets.setdefault(row["selector"], set()).add(row["budget"])
    said = set(shared(rows)["changes"].split())
    many_sets = len({row["dataset"] for row in rows}) > 1
    return [
        " ".join(
            filter(
                None,
                (
                    row["selector"],
                    row["budget"] if len(budgets[row["selector"]]) > 1 else "",
                    *(short(change) for change in row["changes"].split() if change not in said),
                    row["dataset"] if many_sets else "",
                ),
            )
        )
        for row in rows
    ]


def short(change: str) -> str:
    """An override without what everybody knows: `adapted` of adapter=own, the last folder of a path."""
    key, _, value = change.partition("=")
    if key == "adapter":
        return "adapted" if value == "own" else f"adapter {value.rsplit('/', 1)[-1]}"
    return value if key in ("experiment", "ablation") else change


def parts(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows over whole datasets, then those over a part, which are never in one table with them; each with its title."""
    whole, limited = ([row for row in rows if row["limited"] is part] for part in (False, True))
    title = "Limited to a part of the samples, not comparable with whole sets:"
    return [(heading, part) for heading, part in (("", whole), (title if whole else "", limited)) if part]


def markdown(rows: Sequence[Row]) -> str:
    """The tables for a README or an issue."""
    tables = [f"{title}\n\n{_markdown(part, rows)}" if title else _markdown(part, rows) for title, part in parts(rows)]
    return "\n".join(tables) + f"\n{legend(rows)}\n"


def _markdown(rows: Sequence[Row], among: Sequence[Row]) -> str:
    shown = columns(rows, among)
    lines = [
        " | ".join(column.title for column in shown),
        " | ".join("---:" if column.numeric else "---" for column in shown),
        *(" | ".join(_escape(column.texts[i]) for column in shown) for i in range(len(rows))),
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def legend(rows: Sequence[Row]) -> str:
    """What all rows share, and what the cells mean."""
    metrics = ", ".join(dict.fromkeys(row["metric"] for row in rows if row["metric"])) or "scores"
    among_all = shared(rows)
    common = "; ".join(among_all[title] for title in ("data", "changes", "note") if among_all[title])
    sentences = [
        f"All rows: {common}." if common else "",
        f"Scores and recall in % [95 % interval; pictures are resampled where questions share one]; groups and "
        f"differences: {metrics}; vs {BASELINE}: paired on the same samples, in points; ms: median per sample.",
        _tests(rows),
        "Several seeds: mean of their trainings, the interval for a new seed and a new picture, ± the spread of seeds."
        if any(len(row["seeds"].split()) > 1 for row in rows)
        else "",
        f"(n x): times the visual tokens of {BASELINE}, not an equal budget."
        if any(unequal(row) for row in rows)
        else "",
        _corpus_note(rows),
    ]
    return " ".join(filter(None, sentences))


def _corpus_note(rows: Sequence[Row]) -> str:
    """What a corpus metric's numbers are, where there is one."""
    named = dict.fromkeys(key.removesuffix(" ceiling") for row in rows for key in row if key.endswith(" ceiling"))
    if not named:
        return ""
    return f"{', '.join(named)}: times 100, as captioning papers print it, of a perfect predictor's."


def comparable(rows: Sequence[Row]) -> list[bool]:
    """Which rows may be called the best: those at the common budget and, where there are any, over whole datasets."""
    whole = any(not row["limited"] for row in rows)
    return [not unequal(row) and not (whole and row["limited"]) for row in rows]


def _tests(rows: Sequence[Row]) -> str:
    compared = differences(rows)
    smallest = [row[f"delta {name} detectable"] for name in compared for row in rows if f"delta {name} mean" in row]
    if not smallest:
        return ""
    low, high = (f"{100 * edge(smallest):.1f}" for edge in (min, max))
    size = low if low == high else f"{low} to {high}"
    return (
        f"*: p < 0.05, exact sign test by picture (McNemar's where none is shared), Holm over the systems. Detectable "
        f"at this n with 80 % power: {size} points."
    )


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def our_row(rows: Sequence[Row]) -> Row | None:
    """The whole method with the highest score, at an equal budget where there is one."""
    family = [row for row in rows if row["status"] == "ok" and row["selector"].startswith("shirg")]
    whole = [row for row in family if row.get("ablation") in (None, "none")]
    return max(whole, key=lambda row: (not unequal(row), row.get(f"{row['metric']} mean") or 0.0), default=None)
