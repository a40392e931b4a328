"""Files that survive a process."""

from pathlib import Path

import pytest

from experiments.atomic_files import Journal, clear_temporaries, read_json, replacing, write_atomic, write_json
from experiments.errors import ConfigError

KIND = "numbers, format 1"


def entries(path: Path) -> list[bytes]:
    with Journal(path, KIND) as journal:
        return [entry for _, entry in journal]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A journal of three entries."""
    path = tmp_path / "journal"
    with Journal(path, KIND) as journal:
        places = [journal.append(entry) for entry in (b"zero", b"one" * 100, b"two\n")]
        assert [journal.read(place) for place in reversed(places)] == [b"two\n", b"one" * 100, b"zero"]
    return path


def test_a_journal_that_ends_anywhere_has_the_entries_before(three: Path) -> None:
    """A process that is killed, or a power cut after which zeros are read: the rest is written again."""
    whole, kept = three.read_bytes(), set()
    ends = [len(KIND) + 1 + 8 + 4, len(whole) - 8 - 4, len(whole)]
    for end in range(0, len(whole), 3):
        for tail in (0, min(after for after in ends if after > end) - end):
            three.write_bytes(whole[:end] + bytes(tail))
            found = entries(three)
            assert found == [b"zero", b"one" * 100, b"two\n"][: len(found)]
            kept.add(len(found))
            with Journal(three, KIND) as journal:
                journal.append(b"new")
            assert entries(three) == [*found, b"new"]
    assert kept == {0, 1, 2}


def test_nothing_is_written_before_the_first_entry(tmp_path: Path) -> None:
    assert entries(tmp_path / "journal") == [] and (tmp_path / "journal").stat().st_size == 0


@pytest.mark.parametrize("place", [5, 24, 30, 40])
def test_a_byte_that_changed_is_not_passed_over(three: Path, place: int) -> None:
    """In the first line, a checksum and two entries."""
    content = bytearray(three.read_bytes())
    content[place] ^= 1
    three.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a journal of this version, or was changed"):
        entries(three)
    assert three.read_bytes() == content


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
    clear_temporaries(tmp_path, only="other.json")
    assert len(list(tmp_path.iterdir())) == len(left) + len(kept)
    clear_temporaries(tmp_path, besides="result.json")
    assert not (tmp_path / left[0]).exists() and (tmp_path / left[1]).exists()
    clear_temporaries(tmp_path, only="result.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    """UTF-8 has no bytes for it, JSON has an escape."""
    write_json(tmp_path / "record.json", {"answer": "\ud800é"})
    assert read_json(tmp_path / "record.json") == {"answer": "\ud800é"}
