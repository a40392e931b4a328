"""How rows are shown to people: which columns, in which words."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from experiments.study import cells
from experiments.study.cells import Cell, unequal
from experiments.study.compare import BASELINE
from experiments.study.rows import Row

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
        Column("n", "count", [cells.n_cell(row) for row in rows]),
        Column("seeds", "count", [cells.seeds_cell(row) for row in rows]),
    ]
    shown += [
        Column(title, "score", [cells.score_cell(row, key) for row in part]) for title, key, part in qualities(rows)
    ]
    shown += [Column(name, "difference", [cells.effect_cell(row, name) for row in rows]) for name in ("disc1", "disc2")]
    shown += [
        Column(name, "difference", [cells.difference_cell(row, name) for row in rows]) for name in differences(rows)
    ]
    shown.append(Column("recall", "score", [cells.percent_cell(row.get("recall mean")) for row in rows]))
    for name in ("visual tokens", "cache tokens", "prefix tokens"):
        shown.append(Column(name, "cost", [cells.tokens_cell(row, name) for row in rows]))
    if len({row.get("steps mean") for row in rows}) > 1:
        shown.append(Column("steps", "cost", [cells.range_cell(row, "steps") for row in rows]))
    if any(row.get("drift") is not None for row in rows):
        shown.append(Column("cache KiB", "cost", [cells.kib_cell(row.get("cache bytes")) for row in rows]))
        shown.append(Column("max logit drift", "cost", [cells.drift_cell(row.get("drift")) for row in rows]))
        shown.append(Column("same top-1", "count", [cells.percent_cell(row.get("same top1")) for row in rows]))
    shown += [Column(f"{stage} ms", "cost", [cells.cost_cell(row, f"{stage} ms") for row in rows]) for stage in _STAGES]
    shown.append(Column("peak MiB", "cost", [cells.cost_cell(row, "peak memory MiB") for row in rows]))
    shown.append(
        Column("trained parameters", "count", [cells.count_cell(row["trainable parameters"] or None) for row in rows])
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
