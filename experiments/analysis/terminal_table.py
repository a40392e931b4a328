"""The table on a terminal: what people compare first, and more columns the wider the terminal is.

No cell is broken over lines. Scores have half the width of their interval behind them; `wide` prints what table.md has.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import get_terminal_size

import pandas as pd
from rich.cells import cell_len, set_cell_size

from experiments.analysis.columns import (
    EMPTY,
    Cell,
    Column,
    columns,
    cost_cell,
    delta_cell,
    differences,
    names_in_keys,
    score_cell,
)
from experiments.analysis.rows import Row, unequal
from experiments.analysis.table import NAME, legend, parts, records
from experiments.errors import visible

GAP = 2
"""Spaces between columns."""
SHORT = (48, 36, 28)
"""Characters of a system's name where there is no room for all of it and the scores."""
MORE = 9
"""Rank of the first column that only wide terminals show."""


@dataclass(frozen=True)
class Shown:
    """A column of the terminal's table; the first one that fits of its forms is shown.

    Titles have one or two lines.
    """

    title: str
    forms: tuple[tuple[str, ...], ...]
    """Texts of the cells, the longest form first."""
    right: bool = True

    def width(self, form: int = 0) -> int:
        return max(map(cell_len, (*self.title.split("\n"), *self.forms[form])))


def print_table(frame: pd.DataFrame, study: Path, *, wide: bool = False) -> None:
    """The table, what its cells mean, and where its files are."""
    rows = records(frame)
    if not rows:
        return
    width = get_terminal_size().columns
    left_out: dict[str, None] = {}
    for title, part in parts(rows):
        if title:
            print("\n".join(textwrap.wrap(title, width)))
        shown = [_whole(column) for column in columns(part, rows) if not column.page_only]
        if not wide:
            shown, hidden = fitting(compact(part, rows, shown), width)
            left_out |= dict.fromkeys(hidden)
        print("\n".join(lines(shown)), end="\n\n")
    for row in rows:
        if row["status"] != "ok" and (row["reason"] or row["flags"]):
            print(visible(f"{row['status']}  {row['job']}: {row['reason']}"))
    print("\n".join(textwrap.wrap(visible(legend(rows, compact=not wide)), width, break_long_words=False)))
    if left_out:
        n = f"{len(left_out)} more column{'s' if len(left_out) > 1 else ''}"
        print("\n".join(textwrap.wrap(f"{n}: widen the terminal, add --wide, or read table.md.", width)))
    shown_as = study.relative_to(Path.cwd()) if study.is_relative_to(Path.cwd()) else study
    print(f"table: {shown_as / NAME}.md   report: {shown_as / 'report.html'}")


def lines(shown: Sequence[Shown]) -> Iterator[str]:
    """The lines of a table whose columns all have one form left."""
    titles = [column.title.split("\n") for column in shown]
    height = max(map(len, titles))
    head = [["", ""][: height - len(title)] + title for title in titles]
    widths = [column.width() for column in shown]
    body = [column.forms[0] for column in shown]
    for texts in zip(*head, strict=True):
        yield _line(texts, widths, shown)
    yield "─" * (sum(widths) + GAP * (len(widths) - 1))
    for texts in zip(*body, strict=True):
        yield _line(texts, widths, shown)


def _line(texts: Sequence[str], widths: Sequence[int], shown: Sequence[Shown]) -> str:
    padded = [
        " " * (width - cell_len(text)) + text if column.right else set_cell_size(text, width)
        for text, width, column in zip(texts, widths, shown, strict=True)
    ]
    return (" " * GAP).join(padded).rstrip()


def fitting(candidates: Sequence[tuple[float, Shown]], width: int) -> tuple[list[Shown], list[str]]:
    """The columns that fit beside each other, in the order of `candidates`, and the titles of the others.

    Args:
        candidates: each column with its rank: lower ones are taken first, and the first one in any case. Those from
            `MORE` on are taken where all others have their longest form.
    """
    by_rank = sorted(range(len(candidates)), key=lambda i: candidates[i][0])
    first = [i for i in by_rank if candidates[i][0] < MORE]
    taken: dict[int, int] = {}
    room = _widen(candidates, taken, _take(candidates, first, taken, width + GAP))
    if len(taken) == len(first) and not any(taken.values()):
        _widen(candidates, taken, _take(candidates, by_rank[len(first) :], taken, room))
    shown = [Shown(c.title, (c.forms[taken[i]],), c.right) for i, (_, c) in enumerate(candidates) if i in taken]
    return shown, [column.title for i, (_, column) in enumerate(candidates) if i not in taken]


def _take(candidates: Sequence[tuple[float, Shown]], numbers: Sequence[int], taken: dict[int, int], room: int) -> int:
    """Takes columns in their shortest form until one does not fit; returns the room that is left.

    It stops there, so that a wider terminal shows all that a narrower one does.
    """
    for i in numbers:
        shortest = len(candidates[i][1].forms) - 1
        needed = candidates[i][1].width(shortest) + GAP
        if taken and needed > room:
            break
        taken[i] = shortest
        room -= needed
    return room


def _widen(candidates: Sequence[tuple[float, Shown]], taken: dict[int, int], room: int) -> int:
    """Puts longer forms of the columns that are taken into the room that is left; returns what then is left."""
    for i, now in taken.items():
        column = candidates[i][1]
        spare = room + column.width(now)
        taken[i] = next(form for form in range(now + 1) if form == now or column.width(form) <= spare)
        room = spare - column.width(taken[i])
    return room


def compact(rows: Sequence[Row], among: Sequence[Row], whole: Sequence[Shown]) -> list[tuple[float, Shown]]:
    """The columns of a compact table with their ranks: system, score, against the baseline, tokens, ms; then the rest.

    Args:
        whole: the columns of the whole table, which come after those that people compare.
    """
    rest = {column.title: column for column in whole}
    system = rest.pop("system")
    found: list[tuple[float, Shown]] = [(0, replace(system, forms=shortened(system.forms[0])))]
    if any(row["status"] != "ok" for row in rows):
        found.append((1, rest["status"]))
    if "data" in rest:
        found.append((2, rest.pop("data")))
    for i, (title, keys) in enumerate(_scores(rows)):
        cells = [score_cell(row, key) if key else Cell() for row, key in zip(rows, keys, strict=True)]
        found.append((3 if i == 0 else 7, _numbers(title, cells)))
        rest.pop(title, None)
    for i, name in enumerate(differences(rows)):
        cells = [delta_cell(row, name) for row in rows]
        found.append((4 if i == 0 else 8, _numbers(name.replace(" vs ", "\nvs "), cells)))
        rest.pop(name, None)
    found += [(5, Shown("tokens", (tuple(map(_tokens, rows)),))), (6, _milliseconds(rows))]
    same_n = len({row["n"] for row in rows if row["n"]}) < 2
    for name in ("status", "total ms", "visual tokens", *(["n"] if same_n else [])):
        rest.pop(name, None)
    return found + [(MORE + i, column) for i, column in enumerate(rest.values())]


def shortened(names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The names, and shorter forms of them without their middle, as long as no two become equal."""
    forms = [names]
    for width in SHORT:
        half = width // 2
        cut = tuple(f"{n[: half - 1]}…{n[-half:]}" if len(n) > width else n for n in names)
        if cut != forms[-1] and len(set(cut)) == len(set(names)):
            forms.append(cut)
    return tuple(forms)


def _scores(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Title and the key of each row: by group where a dataset has some, its headline metric where not."""
    kind = "group" if names_in_keys(rows, "group ", " mean") else "subset"  # older records have no groups
    names = names_in_keys(rows, f"{kind} ", " mean")
    whole = [
        "" if any(row.get(f"{kind} {name} mean") is not None for name in names) else row["metric"] or "" for row in rows
    ]
    metrics = sorted(set(filter(None, whole)))
    by_group = [(name, [f"{kind} {name}"] * len(rows)) for name in names]
    return by_group + [(metrics[0] if len(metrics) == 1 else "score", whole)] if metrics else by_group


def _numbers(title: str, cells: Sequence[Cell]) -> Shown:
    """Scores or differences with half the width of their interval."""
    return Shown("\n".join(map(visible, title.split("\n"))), (tuple(map(half_width, cells)),))


def half_width(cell: Cell) -> str:
    """A mean with half the width of its interval; a difference with its star."""
    if cell.low is None or cell.high is None:
        return cell.main
    half = (cell.high - cell.low) / 2
    return f"{cell.main} ±{half:.{1 if half < 9.95 else 0}f}{cell.tail if cell.signed else ''}"


def _tokens(row: Row) -> str:
    """The mean number of vision tokens; where the budget is not the baseline's, its ratio to it."""
    mean = row.get("cache tokens mean", row.get("visual tokens mean"))
    if mean is None:
        return EMPTY
    return f"{mean:.0f} ({row['budget ratio']:.2g}x)" if unequal(row) else f"{mean:.0f}"


def _milliseconds(rows: Sequence[Row]) -> Shown:
    """Medians, with quartiles where there is room."""
    cells = [cost_cell(row, "total ms", fine=True) for row in rows]
    forms = [tuple(cell.brief for cell in cells), tuple(map(_half_of_quartiles, cells)), tuple(c.main for c in cells)]
    return Shown("ms", tuple(dict.fromkeys(forms)))


def _half_of_quartiles(cell: Cell) -> str:
    if cell.quartiles is None or cell.value is None:
        return cell.main
    places = 1 if cell.value < 100 else 0
    return f"{cell.value:.{places}f} ±{(cell.quartiles[1] - cell.quartiles[0]) / 2:.{places}f}"


def _whole(column: Column) -> Shown:
    return Shown(visible(column.title), (tuple(visible(text) for text in column.texts),), column.numeric)
