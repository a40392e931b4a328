"""The study's table files, rebuilt from every result.json whenever a job ends, and the table on the terminal.

table.csv and table.parquet hold the flat rows, table.md and the terminal the columns that people compare.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.analysis.aggregate import merge_shards
from experiments.analysis.columns import columns, legend, markdown, parts
from experiments.analysis.rows import Row, collect
from experiments.atomic_files import write_atomic

NAME = "table"


def refresh(study: Path) -> list[Row]:
    """Reads every job of the study and rewrites its table; one process at a time."""
    study.mkdir(parents=True, exist_ok=True)
    with FileLock(study / f".{NAME}.lock"):
        merge_shards(study)
        rows = collect(study)
        if not rows:
            return rows
        write_atomic(study / f"{NAME}.csv", _csv(rows))
        write_atomic(study / f"{NAME}.parquet", _parquet(rows))
        write_atomic(study / f"{NAME}.md", markdown(rows))
    return rows


def print_table(study: Path) -> None:
    """The table on the terminal, and where it lies."""
    rows = collect(study)
    if not rows:
        return
    for title, part in parts(rows):
        if title:
            print(title)
        _print(part, rows)
    print(legend(rows))
    shown_as = study.relative_to(Path.cwd()) if study.is_relative_to(Path.cwd()) else study
    print(f"table: {shown_as / NAME}.md   report: {shown_as / 'report.html'}")


def _print(rows: Sequence[Row], among: Sequence[Row]) -> None:
    shown = columns(rows, among)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        table.add_column(column.title, justify="right" if column.numeric else "left", overflow="fold")
    for i in range(len(rows)):
        table.add_row(*(escape(column.texts[i]) for column in shown))
    console = Console()
    wide = Console(width=max(console.width, 40 + sum(max(map(len, [c.title, *c.texts])) + 2 for c in shown)))
    (console if console.is_terminal else wide).print(table)


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=_keys(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _parquet(rows: Sequence[Row]) -> bytes:
    keys = _keys(rows)
    texts = [{key: None if row.get(key) is None else row[key] for key in keys} for row in rows]
    mixed = {key for key in keys if len({type(row[key]) for row in texts if row[key] is not None} - {int, float}) > 0}
    plain = [
        {key: str(row[key]) if key in mixed and row[key] is not None else row[key] for key in keys} for row in texts
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(plain), buffer)
    return buffer.getvalue()


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
