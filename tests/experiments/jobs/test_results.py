"""result.json and samples.parquet: the row schema, and a study of format 1 (commit 5e004d2) that is completed."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from experiments.atomic_files import remove_path
from experiments.jobs import results
from experiments.jobs.results import VERSION, adapter_path, config_hash, files_digest, read_result
from experiments.jobs.sample_rows import SampleColumns, SampleRow, read_rows, read_tables, table_of, write_tables
from tests.experiments.conftest import Command, result_of, rows_of
from tests.experiments.planting import write_rows

STUDY = Path(__file__).parents[2] / "golden/study_format_1"
FINISHED = (
    "eval_adapter-own_batch_size-4_data.n-48_selector-shirg",
    "eval_adapter-null_batch_size-4_data.n-48_selector-pooled",
)
KILLED = "eval_batch_size-4_data.n-48_selector-random"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two finished jobs, and one that was killed after five of its twelve batches."""
    return Path(shutil.copytree(STUDY, tmp_path / "outputs/old", ignore=shutil.ignore_patterns("completed")))


def test_a_record_of_format_1_is_read_as_the_format_of_today(study: Path) -> None:
    for folder in (*FINISHED, KILLED):
        before = result_of(study / folder)
        assert before["version"] == 1 and "_target_" in before["config"]["selector"]
        result = read_result(study / folder)
        assert result is not None and result["version"] == VERSION
        assert "_target_" not in json.dumps(result)
        assert (result["config"]["data"]["leave_out"], result["config"]["data"]["only"]) == ([], [])
        assert result["config_hash"] == config_hash(result["config"]) != before["config_hash"]
        assert result["choices"] == before["choices"] | {"context": "none"} and result["config"]["context"] == {}
        unchanged = before.keys() - {"version", "choices", "config", "config_hash"}
        assert {key: result[key] for key in unchanged} == {key: before[key] for key in unchanged}


def test_a_training_from_before_an_option_has_its_default(tmp_path: Path) -> None:
    config = {"stage": "text", "text": {"first": 6}, "data": {"n": 8}, "seed": 3}
    record = {"version": VERSION, "verb": "train", "choices": {"data": "synth_glyphs_train"}, "config": config}
    (tmp_path / "result.json").write_text(json.dumps(record))
    result = read_result(tmp_path)
    assert result is not None
    found = result["config"]
    assert found["data"] == {"n": 8, "leave_out": [], "only": []}
    assert found["text"] == {"first": 6, "words": 0.0, "fade": 0.0}
    assert (found["codes"], found["seed"], found["unseen"]) == ("words", 3, {})
    assert not {"batch_size", "resume", "overwrite"} & found.keys()  # given always, and never recorded
    assert result["config_hash"] == config_hash(found)


def test_a_study_of_format_1_is_skipped_completed_and_shown(study: Path, command: Command) -> None:
    same = ["study=old", "threads=1", "data.n=48", "batch_size=4", "resume=true"]
    stamps = {folder: (study / folder / "result.json").stat().st_mtime_ns for folder in FINISHED}
    for words in (["selector=shirg", "adapter=own"], ["selector=pooled", "adapter=null"], ["selector=random"]):
        ended = command("eval", *same, *words)
        assert (ended.code, ended.err) == (0, [])
        assert ("finished already" in ended.out) == (words != ["selector=random"])
    assert stamps == {folder: (study / folder / "result.json").stat().st_mtime_ns for folder in FINISHED}

    expected = rows_of(STUDY / "completed")
    found = rows_of(study / KILLED)
    assert [{key: row[key] for key in expected[0]} for row in found] == expected
    assert [row["coverage"] is None for row in found] == [i < 20 for i in range(48)], "five batches are from before"
    done, expected = result_of(study / KILLED), result_of(STUDY / "completed")
    for result in (done, expected):
        del result["data"]["scorer"]  # which version of the metrics scored
    # What did not exist.
    del done["data"]["digests"], done["decoding"]["without_final_answer"], done["quality"]["groups"]
    for key in ("quality", "tokens", "decoding", "data"):
        assert done[key] == expected[key], key
    rows = {row["selector"]: row for row in csv.DictReader((study / "table.csv").open())}
    assert rows.keys() == {"pooled", "random", "shirg"}
    for folder, selector in zip((*FINISHED, KILLED), ("shirg", "pooled", "random"), strict=True):
        score = result_of(study / folder)["quality"]["metrics"]["exact_match"]
        assert float(rows[selector]["exact_match mean"]) == pytest.approx(score["mean"], abs=1e-12)
    assert (study / "report.html").stat().st_size > 10_000


def test_columns_are_the_keys_of_a_row(tmp_path: Path) -> None:
    """Of SampleRow, three are spread over columns of their own; what is written is read back."""
    spread = {"scores": ("score_anls",), "sources": ("n_kept",), "ms": ("ms_prefill",)}
    row = read_rows(STUDY / "completed" / "samples.parquet")[0]
    assert row.keys() == SampleRow.__annotations__.keys()
    write_rows(tmp_path / "samples.parquet", [row])
    assert read_rows(tmp_path / "samples.parquet") == [row]
    plain = [name for name in SampleRow.__annotations__ if name not in spread]
    row["scores"], row["sources"], row["ms"] = {"anls": 0.5}, {"kept": 3}, {"prefill": 1.5}
    write_rows(tmp_path / "samples.parquet", [row])
    schema = pq.read_schema(tmp_path / "samples.parquet")
    assert sorted(schema.names) == sorted([*plain, *(column for columns in spread.values() for column in columns)])


def test_a_block_is_read_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow would read ahead: 20 blocks of 64 KiB of a column, or all texts, before the first is used."""
    monkeypatch.setattr("experiments.jobs.sample_rows.ROW_GROUP", 64)
    random = np.random.default_rng(0)
    (row,) = read_rows(STUDY / "completed" / "samples.parquet")[:1]
    rows = [
        {**row, "id": str(i), "kept_map": random.random(128).tolist(), "picture": f"picture {i // 5 % 200}"}
        for i in range(20 * 64)
    ]
    with open(tmp_path / "samples.parquet", "wb") as file:
        write_tables(file, [table_of(cast(list[SampleRow], rows))])
    columns = SampleColumns(tmp_path / "samples.parquet")
    before, held = pa.total_allocated_bytes(), []
    for block in columns.tables(["kept_map"]):
        held.append(pa.total_allocated_bytes() - before)
        assert len(block) == 64
    assert len(held) == 20 and max(held) < 5 * 64 * 1024
    # The texts of a column are numbered in the order of their first rows, whatever block they are in.
    number_N, texts = columns.coded("picture")
    assert texts == [f"picture {i}" for i in range(200)]
    assert number_N.tolist() == [i // 5 % 200 for i in range(len(rows))] == columns.pictures().tolist()


def test_parts_are_written_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In row groups of 20; one part has a score and a time that the others do not have, and no digests."""
    monkeypatch.setattr("experiments.jobs.sample_rows.ROW_GROUP", 20)
    rows = read_rows(STUDY / "completed" / "samples.parquet")
    for row in rows:
        row["picture_digest"] = "0" * 16
    rows[40]["scores"], rows[40]["ms"], rows[40]["picture_digest"] = {"anls": 0.5}, {"cache": 1.0}, None
    parts = [table_of(rows[i : i + 7]) for i in range(0, len(rows), 7)]
    with open(tmp_path / "parts.parquet", "wb") as file:
        write_tables(file, parts)
    read = list(map(len, read_tables(tmp_path / "parts.parquet", ["id"])))
    assert read == [20, 20, 8] and pq.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 3
    found = read_rows(tmp_path / "parts.parquet")
    for row, other in zip(rows, found, strict=True):
        assert other["picture_digest"] is None, "some rows are from before digests"
        assert {k: v for k, v in other["scores"].items() if v is not None} == row["scores"]
        assert {k: v for k, v in other["ms"].items() if v is not None} == row["ms"]
        later = ("picture_digest", "scores", "ms")
        assert {k: v for k, v in other.items() if k not in later} == {k: v for k, v in row.items() if k not in later}
    names = pq.read_schema(tmp_path / "parts.parquet").names
    assert names.index("score_anls") < names.index("n_kept") < names.index("ms_cache")


@pytest.fixture
def model(tmp_path: Path) -> dict[str, str]:
    for name in ("pooled", "shirg"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    return {"path": str(tmp_path)}


def test_names_lie_beside_the_weights(model: dict[str, str]) -> None:
    assert adapter_path(None, model, "shirg") is None
    assert adapter_path("own", model, "shirg") == f"{model['path']}/adapters/shirg"
    assert adapter_path("pooled", model, "shirg") == f"{model['path']}/adapters/pooled"
    assert adapter_path("somewhere/else", model, "shirg") == "somewhere/else"


def test_an_adapter_that_is_not_there(model: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"there is no adapter saint in .* \(pooled, shirg\); train one: python"):
        adapter_path("own", model, "saint")
    with pytest.raises(ValueError, match="it has none"):
        adapter_path("own", {"path": "org/model"}, "shirg")


@pytest.mark.parametrize("name", ["extra.safetensors", "adapter.json"])
def test_only_files_of_bytes_are_read_for_the_digest(tmp_path: Path, name: str) -> None:
    """A pipe or a device has no end."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    alone = files_digest(str(tmp_path))
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("gone"), lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / name)
        assert files_digest(str(tmp_path)) == alone
        remove_path(tmp_path / name)


def test_a_copy_of_large_files_is_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever time it is from; and another value in any tensor, at its beginning or end, is another one."""
    monkeypatch.setattr(results, "QUICK_BYTES", 2**14)
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.arange(8000.0) for name in "abc"}
    save_file(tensors, path)
    before = files_digest(str(tmp_path))
    os.utime(path, (1, 1))
    assert files_digest(str(tmp_path)) == before
    found = {before}
    for name, place in (("a", 0), ("b", 0), ("b", -1), ("c", -1)):
        changed = {**tensors, name: tensors[name].index_fill(0, torch.tensor([place % 8000]), 7.5)}
        save_file(changed, path)
        found.add(files_digest(str(tmp_path)))
    assert len(found) == 5


@pytest.mark.parametrize("content", [b"", b"\xff" * 40_000, b"[" * 40_000, b"\x02\0\0\0\0\0\0\0[]" + bytes(40_000)])
def test_large_files_that_are_broken_have_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(results, "QUICK_BYTES", 2**14)
    (tmp_path / "model.safetensors").write_bytes(content)
    digest = files_digest(str(tmp_path))
    assert digest is not None and len(digest) == 16
