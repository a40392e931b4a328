"""Files that survive a process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from experiments.atomic_files import Journal, clear_temporaries, read_json, replacing, write_atomic, write_json
from experiments.errors import ConfigError
from experiments.evaluate import without_kept


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"batch": 0, "text": "ä"})
        journal.append({"batch": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"batch": 2, "rows": [{"id"')
    with Journal(path) as journal:
        assert [entry["batch"] for entry in journal.entries] == [0, 1]
        assert path.read_bytes() == whole
        journal.append({"batch": 2})
    assert [json.loads(line)["batch"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_what_is_slim_in_memory_is_whole_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    entries = [{"batch": i, "kept": list(range(i)), "text": "ä\r\u2028"} for i in range(4)]

    def slim(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "kept": []}

    with Journal(path, slim) as journal:
        for entry in entries[:2]:
            journal.append(entry)
    path.write_bytes(path.read_bytes() + b'{"torn')
    with Journal(path, slim) as journal:
        assert [journal.load(i) for i in (1, 0)] == [entries[1], entries[0]]
        for entry in entries[2:]:
            journal.append(entry)
        assert journal.entries == list(map(slim, entries))
        assert [journal.load(i) for i in (3, 0, 2, 1)] == [entries[i] for i in (3, 0, 2, 1)]


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"batch": 0}\n{"bat\n{"batch": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not one of this job's"):
        Journal(path)


def test_a_write_leaves_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"status": "running"})

    def dies(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("experiments.atomic_files.os.replace", dies)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"status": "ok"})
    assert read_json(path) == {"status": "running"}


def test_a_result_holds_no_number_that_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"mean": float("nan")})


def test_reading_what_is_not_there_and_what_is_broken(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    write_atomic(tmp_path / "broken.json", "{")
    with pytest.raises(ValueError, match="delete it and run the job again"):
        read_json(tmp_path / "broken.json")


def test_two_machines_with_one_process_id_do_not_share_a_temporary(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with replacing(path) as one:
        one.write(b"one")
        with replacing(path) as other:  # the same process id, as two containers may have it
            other.write(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [".table.csv.0123456789ab.tmp", ".result.json.4711"]
    kept = [".lock", ".table.lock", ".refresh_seconds", "result.json", ".last.ckpt.tmp", ".notes.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("")
    clear_temporaries(tmp_path, min_age_s=60)
    assert len(list(tmp_path.iterdir())) == len(left) + len(kept)
    os.utime(tmp_path / left[0], (0, 0))
    clear_temporaries(tmp_path, min_age_s=60)
    assert not (tmp_path / left[0]).exists() and (tmp_path / left[1]).exists()
    clear_temporaries(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("line", ["3", "[]", "null", '"text"', "{}", '{"rows": [3]}', '{"rows": [{}]}', "[" * 100_000])
def test_lines_of_another_program(tmp_path: Path, line: str) -> None:
    (tmp_path / "journal.jsonl").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match="line 1 is not one of this job's"):
        Journal(tmp_path / "journal.jsonl", without_kept)


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    """UTF-8 has no bytes for it, JSON has an escape."""
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"answer": "\ud800é"})
        assert journal.load(0) == {"answer": "\ud800é"}
    write_json(tmp_path / "record.json", {"answer": "\ud800é"})
    assert read_json(tmp_path / "record.json") == {"answer": "\ud800é"}
