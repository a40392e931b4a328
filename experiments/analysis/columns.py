"""The table that people read, column by column: each cell's text in parts, and the numbers behind it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.analysis.overlap import PREFIX
from experiments.analysis.paired import OF_FULL
from experiments.analysis.rows import Row, flags, unequal
from experiments.analysis.stats import stars
from experiments.analysis.system_names import labels, shared_changes
from experiments.analysis.systems import POSITION
from experiments.metrics import CLEAN

EMPTY = "-"
SUSPICIOUS = "!"
"""Behind a time or a memory that the device should not reach; the column "flags" has the reason."""
_CHANCE = " chance"
_STAGES = ("select", "prefill", "cache", "denoise", "total")

Kind = Literal["text", "count", "score", "difference", "cost"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Cell:
    """One cell of the table. Its text is `main spread [low, high]tail`; every output takes the parts that it shows."""

    main: str = EMPTY
    value: float | None = None
    """What the cell is sorted by and drawn from; scores and differences are in points, from 0 to 100."""
    low: float | None = None
    high: float | None = None
    signed: bool = False
    """Whether the interval's numbers have a sign, as those of a difference."""
    spread: str = ""
    """The standard deviation of the seeds' means, or the quartiles of a time."""
    tail: str = ""
    """What follows the interval: a star for significance, or the best possible score."""
    hint: str = ""
    """A remark that the page shows at the pointer."""
    suspicious: bool = False
    """Whether it is shown with a flag, and then not among the best."""
    quartiles: tuple[float, float] | None = None
    """Between which half of the measurements lie, of which the value is the median."""

    @property
    def interval(self) -> tuple[str, str] | None:
        """Both ends of the 95 % interval as texts; None for a cell without one."""
        if self.low is None or self.high is None:
            return None
        places = "+.1f" if self.signed else ".1f"
        return format(self.low, places), format(self.high, places)

    @property
    def brief(self) -> str:
        """The text without the interval and what follows it."""
        return f"{self.main} {self.spread}" if self.spread else self.main

    @property
    def text(self) -> str:
        ends = self.interval
        return self.brief + (f" [{ends[0]}, {ends[1]}]" if ends else "") + self.tail


@dataclass(frozen=True)
class Column:
    """A column of the table, one cell for each row."""

    title: str
    kind: Kind
    cells: list[Cell] = field(default_factory=list)
    better: Better | None = None
    """Which values are the better ones; None where neither is, for example a token count."""
    secondary: bool = False
    """Whether the page shows it on request only and a paper's table leaves it out: the figures have it too."""
    page_only: bool = False
    """Whether the terminal and table.md leave it out, too; then it is also `secondary`."""
    measured: bool = False
    """Whether its values are times, which differ from run to run."""

    @property
    def texts(self) -> list[str]:
        return [cell.text for cell in self.cells]

    @property
    def numeric(self) -> bool:
        return self.kind != "text"

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is, 0 where neither is."""
        return {"higher": 1, "lower": -1, None: 0}[self.better]

    def best(self, among: Sequence[bool]) -> set[int]:
        """Numbers of the rows with the best value; nothing is best among fewer than two, or where all are equal.

        Of times, only one whose upper quartile is below the lower quartile of all others: a smaller difference is no
        more than the spread.

        Args:
            among: for each row, whether it takes part.
        """
        values = {
            i: self.sign * cell.value
            for i, cell in enumerate(self.cells)
            if self.better is not None and among[i] and cell.value is not None and not cell.suspicious
        }
        if len(set(values.values())) < 2:
            return set()
        best = {i for i, value in values.items() if value == max(values.values())}
        return best if not self.measured else {i for i in best if self._is_apart(i, values)}

    def _is_apart(self, i: int, others: Iterable[int]) -> bool:
        """Whether the quartiles of a time are known and below those of the other rows."""
        edges = {j: self.cells[j].quartiles for j in others}
        mine = edges.pop(i)
        return mine is not None and all(edge is not None and mine[1] < edge[0] for edge in edges.values())


def columns(rows: Sequence[Row], among: Sequence[Row] | None = None) -> list[Column]:
    """What table.md, the terminal, the page and LaTeX show.

    Left out are empty columns, and data and notes that all rows share: the legend says those once.

    Args:
        among: the rows of the legend, where `rows` are a part of them.
    """
    everything = rows if among is None else among
    common = shared(everything)
    in_legend = set(common["changes"].split())
    names = dict(zip((row["job"] for row in everything), labels(everything, with_data=False), strict=True))
    changes = [" ".join(word for word in row["changes"].split() if word not in in_legend) for row in rows]
    notes = ["; ".join(filter(None, (row["reason"], row["note"]))) for row in rows]
    shown = [
        Column("system", "text", [Cell(names[row["job"]]) for row in rows]),
        Column("data", "text", [Cell(_data(row)) for row in rows]),
        Column("budget", "count", [Cell(str(row["budget"])) for row in rows], secondary=True),
        Column("changes", "text", [Cell(text) for text in changes], secondary=True),
        Column("n", "count", [n_cell(row) for row in rows]),
        Column("seeds", "count", [seeds_cell(row) for row in rows]),
        *(Column(title, "score", [score_cell(r, key) for r in part], "higher") for title, key, part in qualities(rows)),
        *(Column(name, "difference", [effect_cell(row, name) for row in rows]) for name in ("disc1", "disc2")),
        *(Column(name, "difference", [delta_cell(r, name) for r in rows], "higher") for name in differences(rows)),
        *(Column(f"{name}, %", "score", [percent_cell(r.get(name)) for r in rows], "higher") for name in of_full(rows)),
        Column("recall", "score", [percent_cell(row.get("recall mean")) for row in rows], "higher"),
    ]
    shown += kept_columns(rows, everything)
    for name in ("visual tokens", "cache tokens", "prefix tokens"):
        cells = [tokens_cell(row, name) for row in rows]
        shown.append(Column(name, "cost", cells, secondary=name == "prefix tokens"))
    if len({row.get("steps mean") for row in rows}) > 1:
        shown.append(Column("steps", "cost", [range_cell(row, "steps") for row in rows]))
    if any(row.get("drift") is not None for row in rows):
        shown.append(Column("cache KiB", "cost", [kib_cell(row.get("cache bytes")) for row in rows]))
        shown.append(Column("max logit drift", "cost", [drift_cell(row.get("drift")) for row in rows]))
        shown.append(Column("same top-1", "count", [percent_cell(row.get("same top1")) for row in rows]))
    for stage in _STAGES:
        cells = [cost_cell(row, f"{stage} ms", fine=True) for row in rows]
        shown.append(Column(f"{stage} ms", "cost", cells, "lower", secondary=stage != "total", measured=True))
    shown += [
        Column("peak MiB", "cost", [cost_cell(row, "peak memory MiB") for row in rows], "lower"),
        Column("trained parameters", "count", [count_cell(row.get("trainable parameters") or None) for row in rows]),
        Column("flags", "text", [Cell(row["flags"]) for row in rows]),
        Column("status", "text", [Cell(row["status"]) for row in rows]),
        Column("note", "text", [Cell(note) for note in notes]),
    ]
    failed = any(row["reason"] or row["flags"] for row in rows)
    idle = {title for title in ("data", "note") if common[title] and not (title == "note" and failed)}
    return [c for c in shown if c.title not in idle and any(text not in ("", EMPTY) for text in c.texts)]


def kept_columns(rows: Sequence[Row], among: Sequence[Row]) -> list[Column]:
    """Statistics of what is kept (docs/report.md): none of their values is the better one."""
    # Of a large study only the first systems have overlaps.
    keys = {key for row in rows for key in row if key.startswith(PREFIX) and key.endswith(_CHANCE)}
    jobs = {key[len(PREFIX) : -len(_CHANCE)] for key in keys}
    names = {row["job"]: label for row, label in zip(among, labels(among), strict=True) if row["job"] in jobs}
    return [
        Column("coverage", "cost", [percent_cell(row.get("coverage mean")) for row in rows], None, True, True),
        Column("gini", "cost", [ratio_cell(row.get("gini mean")) for row in rows], None, True, True),
        Column(POSITION, "cost", [ratio_cell(row.get(POSITION)) for row in rows], None, True, True),
        Column("most alike", "text", [alike_cell(row, names) for row in rows], None, True, True),
    ]


def alike_cell(row: Row, names: Mapping[str, str]) -> Cell:
    """The system whose kept tokens have the largest overlap with the row's beyond that of random selections.

    `none` where no interval lies above chance. Empty where chance is unknown, as in older studies: the system that
    keeps most would often be named.

    Args:
        names: labels of the systems by job.
    """
    beyond = {}
    keys = [f"{PREFIX}{job}" for job in names if row.get(f"{PREFIX}{job}{_CHANCE}") is not None]
    for key in keys:
        low, chance = row[f"{key} low"], row[f"{key} chance"]
        if low is not None and low > chance:
            beyond[key] = row[f"{key} mean"] - chance
    if not beyond:
        return Cell("none") if keys else Cell()
    best = max(beyond, key=lambda key: beyond[key])
    mean, chance = row[f"{best} mean"], row[f"{best} chance"]
    return Cell(f"{names[best.removeprefix(PREFIX)]} {mean:.2f} (chance {chance:.2f})", mean)


def seeds_cell(row: Row) -> Cell:
    """How many seeds a row has; equal ones are those of a system that draws nothing."""
    n = len(row["seeds"].split())
    return Cell(f"{n} equal" if row.get("seeds equal") else str(n), n) if n > 1 else Cell()


def n_cell(row: Row) -> Cell:
    """The number of questions; of a part also the number that there are."""
    cell = count_cell(row["n"])
    return replace(cell, main=f"{cell.main} of {row['of']}") if row["limited"] and row["of"] else cell


def score_cell(row: Row, name: str) -> Cell:
    """A score. Scores of cleaned answers have no interval: it is that of the raw answers beside them."""
    cell = percent_cell(row.get(f"{name} mean")) if name.endswith(CLEAN) else _interval_cell(row, name)
    top = row.get(f"{name} ceiling")
    return cell if top is None else replace(cell, tail=f" of {percent_cell(top).main}")


def effect_cell(row: Row, name: str) -> Cell:
    """A difference within one system, between two kinds of question."""
    return replace(_interval_cell(row, name, signed=True), spread="", hint="")


def delta_cell(row: Row, name: str) -> Cell:
    """A paired difference to another row, with a star where it is significant."""
    cell = _interval_cell(row, f"delta {name}", signed=True)
    if cell.value is None:
        return cell
    p = row[f"delta {name} p holm"]
    return replace(cell, spread="", tail=stars(p), hint=p_value(p))


def _interval_cell(row: Mapping[str, float], name: str, *, signed: bool = False) -> Cell:
    """A mean with its 95 % interval, in points from shares."""
    if row.get(f"{name} mean") is None:
        return Cell()
    mean, low, high = (100 * row[f"{name} {key}"] for key in ("mean", "low", "high"))
    between = row.get(f"{name} between")
    spread = "" if between is None else f"± {100 * between:.1f}"
    return Cell(format(mean, "+.1f" if signed else ".1f"), mean, low, high, signed, spread, hint=spread)


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def percent_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{100 * value:.1f}", 100 * value)


def ratio_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.2f}", value)


def tokens_cell(row: Row, name: str) -> Cell:
    """A mean and its range. Where the budget is not the baseline's, the count that decides it has the ratio to it."""
    cell = range_cell(row, name)
    decides = "visual tokens" if row.get("cache tokens mean") is None else "cache tokens"
    if cell.value is None or not unequal(row) or name != decides:
        return cell
    return replace(cell, main=f"{cell.main} ({row['budget ratio']:.2g}x)")


def range_cell(row: Row, name: str) -> Cell:
    if row.get(f"{name} mean") is None:
        return Cell()
    low, high, mean = row[f"{name} min"], row[f"{name} max"], row[f"{name} mean"]
    return Cell(str(low) if low == high else f"{mean:.{1 if high < 10 else 0}f} ({low}-{high})", mean)


def kib_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value / 1024:.1f}", value / 1024)


def drift_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.2g}", value)


def cost_cell(row: Row, name: str, *, fine: bool = False) -> Cell:
    """A memory, or a time with its quartiles; with `fine`, small values have decimals. A suspicious one has a mark, and
    its reason.
    """
    value = row.get(name)
    if value is None:
        return Cell()
    places = 2 if fine and value < 10 else 1 if fine and value < 100 else 0
    why, shown = flags(row).get(name, ""), f"{value:.{places}f}{mark_of(row, name)}"
    if (low := row.get(f"{name} q1")) is None:
        return Cell(shown, value, hint=why, suspicious=bool(why))
    high = row[f"{name} q3"]
    spread = f"({low:.{places}f}-{high:.{places}f})"
    return Cell(shown, value, spread=spread, hint=why, quartiles=(low, high), suspicious=bool(why))


def mark_of(row: Row, name: str) -> str:
    return SUSPICIOUS if name in flags(row) else ""


def doubts(rows: Sequence[Row], name: str) -> str:
    """A sentence about the systems whose value is suspicious, with the reasons; "" where none is."""
    marked = [(label, flags(row)) for row, label in zip(rows, labels(rows), strict=True)]
    reasons = "; ".join(f"{label}: {found[name]}" for label, found in marked if name in found)
    return f" Suspicious ({SUSPICIOUS}): {reasons}." if reasons else ""


def count_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.0f}", value)


def shared(rows: Sequence[Row]) -> dict[str, str]:
    """What all rows have in common of their data, overrides and notes; "" where that is nothing."""
    found = {"changes": " ".join(shared_changes(rows))}
    for title, values in (("data", {_data(row) for row in rows}), ("note", {row["note"] for row in rows})):
        found[title] = (values.pop() or "") if len(values) == 1 else ""
    return found


def _data(row: Row) -> str:
    return str(row["dataset"] or row["data"])


def names_in_keys(rows: Iterable[Row], start: str, end: str) -> list[str]:
    """What is between `start` and `end` in the keys with a value in some row, in the rows' order."""
    return list(
        dict.fromkeys(
            key[len(start) : -len(end)]
            for row in rows
            for key, value in row.items()
            if value is not None and key.startswith(start) and key.endswith(end)
        )
    )


def qualities(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Title, row key and rows of each score: by subset where a dataset has some, the metrics where it has none."""
    subsets = names_in_keys(rows, "subset ", " mean")
    whole = [{} if any(row.get(f"subset {name} mean") is not None for name in subsets) else row for row in rows]
    metrics = dict.fromkeys(metric for row in whole for metric in row.get("metrics", "").split())
    return [
        *((name, f"subset {name}", list(rows)) for name in subsets),
        *((metric, metric, whole) for metric in metrics),
        *((name, f"subtask {name}", whole) for name in names_in_keys(whole, "subtask ", " mean")),
    ]


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


def of_full(rows: Sequence[Row]) -> list[str]:
    """Shares of the score with all tokens: by group where there are groups, as the differences."""
    found = [name for name in dict.fromkeys(key for row in rows for key in row) if name.endswith(OF_FULL)]
    return [name for name in found if name != OF_FULL] or found


def differences(rows: Sequence[Row]) -> list[str]:
    """Differences by group where there are groups; otherwise those over all samples, which would mix the groups."""
    found = names_in_keys(rows, "delta ", " mean")
    by_group = [name for name in found if not name.startswith("vs ")]
    return by_group or found
