"""The table of a study: one DataFrame, read once from every result.json, and the files made of it.

table.csv and table.parquet hold the DataFrame as it is, table.md the columns that people compare.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.analysis import memo
from experiments.analysis.columns import SUSPICIOUS, columns, differences, names_in_keys, of_full, shared
from experiments.analysis.memo import Memo
from experiments.analysis.overlap import overlap_all
from experiments.analysis.paired import BASELINE, OF_FULL, compare_all
from experiments.analysis.rows import Row, group_row, name_seeds, unequal
from experiments.analysis.shards import merge_shards
from experiments.analysis.study import read_study
from experiments.analysis.system_names import labels
from experiments.analysis.systems import Result, RunGroup, group_runs
from experiments.analysis.turns import study_lock
from experiments.atomic_files import clear_temporaries, write_atomic
from experiments.errors import visible
from experiments.measured_times import is_busy
from experiments.profiling import LIMITS

NAME = "table"
_MARKDOWN = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;"})
_FORMULA = ("=", "+", "-", "@")
_FIRST = {BASELINE: 0, "full": 1}


@dataclass(frozen=True)
class StudyTable:
    """A study as its jobs' files were at one moment: all that is published is made of it."""

    study: Path
    results: Mapping[Path, Result]
    """Every usable record, also those of trainings and of shards that were merged."""
    frame: pd.DataFrame
    """One row for each system, the baselines first, then by name; a value that a system lacks is None. No columns
    where nothing was evaluated."""
    memo: Memo


def refresh(study: Path, *, overlaps: bool = True) -> StudyTable:
    """Reads every job of the study and rewrites its table files; one process at a time.

    Args:
        overlaps: False leaves out how much every two systems have in common, which is the work of whole studies: what a
            job does, because the command adds it at its end.
    """
    study.mkdir(parents=True, exist_ok=True)
    with study_lock(study):
        clear_temporaries(study, besides=LIMITS)
        table = read_study_table(study, overlaps=overlaps, merge=True)
        frame = table.frame
        if not frame.empty:
            write_atomic(study / f"{NAME}.csv", to_csv(frame))
            write_atomic(study / f"{NAME}.parquet", _parquet(frame))
            write_atomic(study / f"{NAME}.md", markdown(records(frame)))
        table.memo.save(study / memo.NAME)
    return table


def read_table(study: Path, *, overlaps: bool = True) -> pd.DataFrame:
    """The DataFrame of a study as its jobs' files are now."""
    return read_study_table(study, overlaps=overlaps).frame


def read_study_table(
    study: Path, *, overlaps: bool = True, merge: bool = False, known: Memo | None = None
) -> StudyTable:
    """Reads a study once.

    Args:
        merge: merges complete sets of shards first; under the study's lock only.
        known: what is known from before; the study's own cache when not given.
    """
    found = Memo(study / memo.NAME) if known is None else known
    results = read_study(study, found)
    if merge and any(_is_shard(result) for result in results.values()):
        merge_shards(study)
        results = read_study(study, found)
    rows = collect_rows(results, found, overlaps=overlaps)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    frame = pd.DataFrame([[row.get(key) for key in keys] for row in rows], columns=keys, dtype=object)
    return StudyTable(study, results, frame, found)


def records(frame: pd.DataFrame) -> list[Row]:
    """The rows of the DataFrame, for what goes through them one by one."""
    return [dict(zip(frame.columns, values, strict=True)) for values in frame.to_numpy()]


def collect(study: Path) -> list[Row]:
    """One flat row for each evaluated system of a study as its jobs' files are now."""
    known = Memo(study / memo.NAME)
    return collect_rows(read_study(study, known), known)


def collect_rows(results: Mapping[Path, Result], known: Memo, *, overlaps: bool = True) -> list[Row]:
    """One flat row for each evaluated system, in the order of the table."""
    groups = _groups(results, known)
    rows = [group_row(group) for group in groups]
    compare_all(groups, rows)
    name_seeds(groups, rows)
    pairs = sorted(zip(groups, rows, strict=True), key=lambda pair: _order(pair[1]))
    if overlaps:
        overlap_all([group for group, _ in pairs], [row for _, row in pairs])
    return [row for _, row in pairs]


def run_groups(study: Path) -> list[RunGroup]:
    """The study's evaluations, those that differ in the seed alone as one; shards that were merged are not shown."""
    known = Memo(study / memo.NAME)
    return _groups(read_study(study, known), known)


def _groups(results: Mapping[Path, Result], known: Memo) -> list[RunGroup]:
    evaluated = {folder: result for folder, result in results.items() if result["verb"] == "eval"}
    merged_shards = {shard for result in evaluated.values() for shard in result.get("shards", ())}
    return group_runs({f: result for f, result in evaluated.items() if f.name not in merged_shards}, known)


def _is_shard(result: Result) -> bool:
    return result["verb"] == "eval" and result["config"].get("shards", 1) > 1


def _order(row: Row) -> tuple[object, ...]:
    """Selectors together, the plain one first, small budgets before large ones."""
    tokens = row.get("visual tokens mean") or float("inf")
    return (
        row["limited"],
        row["data"],
        _FIRST.get(row["selector"], 2),
        row["selector"],
        row["changes"],
        tokens,
        row["job"],
    )


def to_csv(frame: pd.DataFrame) -> str:
    """The DataFrame as text. A text that a spreadsheet would run as a formula begins with an apostrophe."""

    def harmless(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value

    values = [[harmless(value) for value in row] for row in frame.to_numpy()]
    plain = pd.DataFrame(values, columns=[harmless(name) for name in frame.columns], dtype=object)
    return str(plain.to_csv(index=False, lineterminator="\n"))


def _parquet(frame: pd.DataFrame) -> bytes:
    plain = frame.copy()
    for name in frame.columns:
        if not all(isinstance(value, int | float) for value in frame[name].dropna()):
            plain[name] = [None if value is None else str(value) for value in frame[name]]
    buffer = io.BytesIO()
    plain.to_parquet(buffer, index=False)
    return buffer.getvalue()


def parts(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows over whole datasets, then those over a part, which are never in one table with them; each with its title.

    A row that failed before its samples were known is about no part: it stands with those over whole datasets, where
    there are any.
    """
    some_whole = any(not row["limited"] for row in rows if row["n"])

    def limited(row: Row) -> bool:
        return bool(row["limited"] if row["n"] else not some_whole)

    whole, rest = ([row for row in rows if limited(row) is part] for part in (False, True))
    title = "Limited to a part of the samples, not comparable with whole sets:"
    return [(heading, part) for heading, part in (("", whole), (title if whole else "", rest)) if part]


def comparable(rows: Sequence[Row]) -> list[bool]:
    """Which rows may be called the best: those at the common budget and, where there are any, over whole datasets."""
    whole = any(not row["limited"] for row in rows)
    return [not unequal(row) and not (whole and row["limited"]) for row in rows]


def markdown(rows: Sequence[Row]) -> str:
    """The tables for a README or an issue."""
    tables = [f"{title}\n\n{_markdown(part, rows)}" if title else _markdown(part, rows) for title, part in parts(rows)]
    return "\n\n".join([*tables, legend(rows)]) + "\n"


def _markdown(rows: Sequence[Row], among: Sequence[Row]) -> str:
    shown = [column for column in columns(rows, among) if not column.page_only]
    texts = zip(*(column.texts for column in shown), strict=True)
    return to_markdown(pd.DataFrame(texts, columns=[c.title for c in shown]), [c.numeric for c in shown])


def to_markdown(frame: pd.DataFrame, right: Sequence[bool]) -> str:
    """A Markdown table of texts; `right`: which columns are aligned to the right."""
    plain = frame.map(_cell).rename(columns=_cell)
    align = ["right" if numeric else "left" for numeric in right]
    return str(plain.to_markdown(index=False, disable_numparse=True, colalign=align))


def _cell(text: str) -> str:
    return visible(text).translate(_MARKDOWN)


def legend(rows: Sequence[Row], *, compact: bool = False) -> str:
    """What all rows share, and what the cells mean.

    Args:
        compact: for a table whose intervals are half widths.
    """
    metrics = ", ".join(dict.fromkeys(row["metric"] for row in rows if row["metric"])) or "scores"
    among_all = shared(rows)
    common = [among_all[title] for title in ("data", "changes", "note") if among_all[title]]
    if compact and len(sizes := {row["n"] for row in rows if row["n"]}) == 1:
        common.insert(1, f"n = {sizes.pop()}")
    if compact:
        scores = f"Scores ({metrics}) in % ± half of their 95 % interval"
        spread = "quartiles, or ± half of their distance"
    else:
        scores = f"Scores ({metrics}) and recall in % [95 % interval; pictures are resampled where questions share one]"
        spread = "quartiles over batches"
    sentences = [
        f"All rows: {'; '.join(common)}." if common else "",
        f"{scores}; vs {BASELINE}: paired on the same samples, in points; ms: median per sample ({spread}), warm-up "
        "left out, of jobs that ran one after the other (python -m experiments.bench end2end lets systems take turns).",
        f"{SUSPICIOUS}: faster or smaller than the device allows, see flags."
        if any(row["flags"] for row in rows)
        else "",
        _tests(rows),
        "Several seeds: mean of their trainings, the interval for a new seed and a new picture, ± the standard "
        "deviation of the seeds' means."
        if any(len(row["seeds"].split()) > 1 and not row.get("seeds equal") for row in rows)
        else "",
        "Equal seeds: nothing is drawn, every seed gives the same answers, and the row counts them once."
        if any(row.get("seeds equal") for row in rows)
        else "",
        _baselines(rows),
        f"{OF_FULL}: the score as a share of that with all tokens, without an adapter where there is such a row."
        if of_full(rows) and not compact
        else "",
        f"(n x): n times the visual tokens of {BASELINE}, not an equal budget."
        if any(unequal(row) for row in rows)
        else "",
        _corpus_note(rows),
        _busy(rows),
    ]
    return " ".join(filter(None, sentences))


def _baselines(rows: Sequence[Row]) -> str:
    """Which rows the others are compared to, where there is a choice."""
    plain = [row["job"] for row in rows if row["selector"] == BASELINE and row.get("cache") in (None, "none")]
    used = list(dict.fromkeys(row[key] for row in rows if (key := f"compared to {BASELINE}") in row))
    used = [job for job in used if job is not None]
    return f"{BASELINE} is {', '.join(used)}." if used and len(plain) > len(used) else ""


def _corpus_note(rows: Sequence[Row]) -> str:
    """What a corpus metric's numbers are, where there is one."""
    named = names_in_keys(rows, "", " ceiling")
    if not named:
        return ""
    return f"{', '.join(named)}: times 100, as captioning papers print it, of a perfect predictor's."


def _busy(rows: Sequence[Row]) -> str:
    """Which times say something about other processes, too."""
    busy = [name for row, name in zip(rows, labels(rows), strict=True) if is_busy(row.get("waited"))]
    if not busy:
        return ""
    which = "all rows" if len(busy) == len(rows) else ", ".join(busy)
    return f"The machine was busy while these were timed: {which}; their ms are too long."


def _tests(rows: Sequence[Row]) -> str:
    found = (row.get(f"delta {name} detectable") for name in differences(rows) for row in rows)
    smallest = [size for size in found if size is not None]
    if not smallest:
        return ""
    low, high = (f"{100 * edge(smallest):.1f}" for edge in (min, max))
    size = low if low == high else f"{low} to {high}"
    return (
        f"*: p < 0.05, exact sign test by picture (McNemar's where none is shared), Holm over the systems. Detectable "
        f"at this n with 80 % power: {size} points."
    )
