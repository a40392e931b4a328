"""The journal of an evaluation: what is read back, what older versions wrote, what somebody else wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from experiments.atomic_files import Journal
from experiments.errors import ConfigError
from experiments.jobs.answer_journal import JOURNAL, KIND, OLD_JOURNAL, AnswerJournal
from experiments.jobs.sample_rows import SampleRow, read_rows, table_of
from tests.experiments.conftest import result_of, rows_of

Eval = Callable[..., Path]
STUDY = Path(__file__).parents[2] / "golden/study_format_1"
ROWS = read_rows(STUDY / "completed" / "samples.parquet")[:5]


def taken(folder: Path) -> list[tuple[str, bool, list[dict[str, Any]]]]:
    with AnswerJournal(folder) as journal:
        return [(batch.weights, batch.warm_up, batch.rows.to_pylist()) for _, batch in journal]


def test_batches_are_read_back(tmp_path: Path) -> None:
    """Times are shared out, token numbers stay int32; nothing but the offsets stays in memory."""
    with AnswerJournal(tmp_path) as journal:
        places = [journal.append(ROWS[:3], {"a": 6.0}, "w", True), journal.append(ROWS[3:], {"b": 5.0}, "w", False)]
        second, first = (journal.read(place).rows for place in reversed(places))
    assert (first["ms_a"].to_pylist(), second["ms_b"].to_pylist()) == ([2.0] * 3, [2.5] * 2)
    assert first.schema.field("kept").type == pa.list_(pa.int32())
    assert first["kept"].to_pylist() + second["kept"].to_pylist() == [row["kept"] for row in ROWS]
    assert [(w, warm, len(rows)) for w, warm, rows in taken(tmp_path)] == [("w", True, 3), ("w", False, 2)]


def test_batches_of_another_compression_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was begun with zstd goes on with LZ4."""
    for compression in ("zstd", "lz4"):
        monkeypatch.setattr("experiments.jobs.answer_journal._LZ4", pa.ipc.IpcWriteOptions(compression=compression))
        with AnswerJournal(tmp_path) as journal:
            journal.append(ROWS, {"a": 5.0}, "w", False)
    first, second = taken(tmp_path)
    assert first == second and [row["kept"] for row in first[2]] == [row["kept"] for row in ROWS]


def test_a_journal_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    """A process that is killed in between takes it over again; a torn last line is left out."""
    (old,) = STUDY.glob(f"*/{OLD_JOURNAL}")
    entries = [json.loads(line) for line in old.read_text().splitlines()]
    for _ in range(2):
        (tmp_path / OLD_JOURNAL).write_bytes(old.read_bytes() + b'{"weights": "')
        found = taken(tmp_path)[-len(entries) :]
        assert not (tmp_path / OLD_JOURNAL).exists()
        assert [[row["id"] for row in rows] for _, _, rows in found] == [
            [row["id"] for row in entry["rows"]] for entry in entries
        ]
        assert [(weights, warm_up) for weights, warm_up, _ in found] == [(e["weights"], e["warm_up"]) for e in entries]
        assert found[0][2][0]["coverage"] is None and found[0][2][0]["ms_tower"] == entries[0]["ms"]["tower"] / 4
    assert len(taken(tmp_path)) == 2 * len(entries)


ROW = json.loads(next(STUDY.glob(f"*/{OLD_JOURNAL}")).read_text().splitlines()[0])["rows"][0]
ODD_ROWS = ([3], [{}], 3, [ROW | {"kept": ["x"]}], [ROW | {"id": 3}], [ROW | {"n_steps": 2**70}], [ROW | {"scores": 1}])


@pytest.mark.parametrize(
    "line",
    ["3", "[]", "null", '"text"', "{}", "[" * 100_000, "not JSON"]
    + [json.dumps({"weights": "w", "warm_up": True, "ms": {"a": 1.0}, "rows": rows}) for rows in ODD_ROWS],
)
def test_lines_of_another_program(tmp_path: Path, line: str) -> None:
    (tmp_path / OLD_JOURNAL).write_text(f"{line}\n")
    with pytest.raises(ConfigError, match="line 1 is not one of this job's"):
        AnswerJournal(tmp_path)


def entry(table: pa.Table, about: object) -> bytes:
    sink = pa.BufferOutputStream()
    metadata = {} if about is None else {b"batch": json.dumps(about)}
    with pa.ipc.new_stream(sink, table.schema.with_metadata(metadata)) as stream:
        stream.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


ABOUT = {"weights": "w", "warm_up": True}
TABLE = table_of(cast(list[SampleRow], ROWS))
FOREIGN = {
    "text": b"text",
    "no rows": entry(TABLE.slice(0, 0), ABOUT),
    "no id": entry(TABLE.drop_columns("id"), ABOUT),
    "an id of null": entry(TABLE.set_column(0, "id", pa.nulls(len(TABLE), pa.string())), ABOUT),
    "another type": entry(TABLE.set_column(0, "id", pa.array([1] * len(TABLE))), ABOUT),
    "another column": entry(TABLE.append_column("more", TABLE["id"]), ABOUT),
    "nothing about it": entry(TABLE, None),
    "a list about it": entry(TABLE, [1]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_entries_of_another_program(tmp_path: Path, kind: str) -> None:
    with Journal(tmp_path / JOURNAL, KIND) as journal:
        journal.append(FOREIGN[kind])
    with pytest.raises(ConfigError, match=r"byte 35 is not a batch of this job .*overwrite=true"):
        taken(tmp_path)


def test_batches_that_the_data_does_not_have_are_answered_again(eval_here: Eval, tmp_path: Path) -> None:
    """More batches than the data has, of other samples and of another size; two of one batch."""
    words = ("selector=pooled", "limit=6", "batch_size=2")
    calm = eval_here(*words, "study=calm")
    rows = read_rows(calm / "samples.parquet")
    weights = result_of(calm)["model"]["weights"]
    other = [{**row, "id": f"other {i}"} for i, row in enumerate(rows)]
    job = calm.parents[1] / "s" / calm.name
    with AnswerJournal(job) as journal:
        for batch in (rows[2:4], other[:2], rows[1:3], rows, rows[2:3], rows[2:4], other[2:]):
            journal.append(cast(list[SampleRow], batch), {"denoise": 1.0}, weights, False)
    assert eval_here(*words, "study=s") == job
    assert rows_of(job) == rows_of(calm)
