"""The journal of an evaluation: every batch is on disk once it is answered, and only its place stays in memory.

An entry is an Arrow IPC stream of a batch's rows, with the columns of samples.parquet. A stopped job goes on from it,
and a finished one writes samples.parquet from it, batch by batch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import pyarrow as pa

from experiments.atomic_files import Journal, remove_path
from experiments.errors import ConfigError
from experiments.jobs.sample_rows import SampleRow, check_types, conform, schema_of, table_of

JOURNAL = "journal.arrow"
OLD_JOURNAL = "journal.jsonl"
"""What earlier versions wrote, a batch in a line; its batches are taken over."""
KIND = "answers of an evaluation, format 1"
_ABOUT = b"batch"
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
"""A batch of 8 rows of 980 kept tokens is read in 0.07 ms, and in 0.7 with zstd, whose file would be 27 % smaller."""
_ONE_THREAD = pa.ipc.IpcReadOptions(use_threads=False)
"""Buffers of a few KiB: handing them to other threads takes longer than reading them."""
_ODD = (pa.ArrowException, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a batch raises that somebody else wrote: it may hold any value."""


@dataclass(frozen=True)
class AnsweredBatch:
    """A batch as the journal has it."""

    rows: pa.Table
    weights: str
    """Fingerprint of the weights that answered it."""
    warm_up: bool
    """The first one of a session, whose times are those of cold caches and allocators."""


class AnswerJournal:
    """The batches that a job has answered so far, in the order in which they were.

    Raises:
        ConfigError: a file that is not such a journal.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self._journal = Journal(self.path, KIND)
        if (folder / OLD_JOURNAL).exists():
            self._take_over(folder / OLD_JOURNAL)

    def append(self, rows: Sequence[SampleRow], ms: Mapping[str, float], weights: str, warm_up: bool) -> int:
        """Where the batch is now.

        Args:
            ms: milliseconds of the whole batch by stage.
        """
        shares = {stage: time / len(rows) for stage, time in ms.items()}
        table = table_of([{**row, "ms": shares} for row in rows])
        about = json.dumps({"weights": weights, "warm_up": warm_up})
        sink = pa.BufferOutputStream()
        schema = table.schema.with_metadata({_ABOUT: about})
        with pa.ipc.new_stream(sink, schema, options=_LZ4) as stream:
            stream.write_table(table)
        return self._journal.append(sink.getvalue().to_pybytes())

    def read(self, offset: int) -> AnsweredBatch:
        return self._decode(offset, self._journal.read(offset))

    def __iter__(self) -> Iterator[tuple[int, AnsweredBatch]]:
        """Every batch with its place."""
        for offset, entry in self._journal:
            yield offset, self._decode(offset, entry)

    def _decode(self, offset: int, entry: bytes) -> AnsweredBatch:
        try:
            rows = pa.ipc.open_stream(entry, options=_ONE_THREAD).read_all()
            rows.validate(full=True)
            check_types(rows.schema)
            about = json.loads(rows.schema.metadata[_ABOUT])
            rows = conform(rows, schema_of(rows.column_names))
            if rows["id"].null_count or not len(rows):
                raise ValueError("rows without an id")
            return AnsweredBatch(rows, str(about["weights"]), bool(about["warm_up"]))
        except _ODD as error:
            raise ConfigError(
                f"{self.path}, byte {offset} is not a batch of this job ({' '.join(str(error).split())}): run the job "
                "again with overwrite=true"
            ) from None

    def _take_over(self, old: Path) -> None:
        """Appends the batches of an older journal and removes it; a torn last line is left out.

        A process that is killed here does it again: of two equal batches the later one counts.
        """
        with open(old, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    rows = [{**row, "id": row["id"]} for row in entry["rows"]]
                    self.append(cast(list[SampleRow], rows), entry["ms"], entry["weights"], entry["warm_up"])
                except _ODD:
                    self._journal.close()
                    raise ConfigError(
                        f"{old}, line {number} is not one of this job's: run the job again with overwrite=true"
                    ) from None
        remove_path(old)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


@dataclass(frozen=True)
class AnsweredTables:
    """The rows of all batches in the order of the data, as often as they are asked for.

    Args:
        offsets: where each batch is in the journal.
    """

    journal: AnswerJournal
    offsets: np.ndarray

    def __iter__(self) -> Iterator[pa.Table]:
        for number, offset in enumerate(self.offsets.tolist()):
            rows = self.journal.read(offset).rows
            column = rows.column_names.index("batch")
            yield rows.set_column(column, "batch", pa.array([number] * len(rows), pa.int32()))
