"""What is known from before: never another number than the files give, whatever happened to them or to the cache."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.analysis import memo, paired, study
from experiments.analysis.memo import Memo
from experiments.analysis.rows import Row
from experiments.analysis.table import read_study_table, records, refresh
from tests.experiments.conftest import result_of
from tests.experiments.planting import change_result, plant

Eval = Callable[..., Path]
WORDS = ("data.n=24", "shots=0")


@pytest.fixture
def jobs(eval_here: Eval) -> dict[str, Path]:
    """Four systems, one of them with two seeds, with planted scores."""
    found = {name: eval_here(f"selector={name}", *WORDS) for name in ("pooled", "full", "shirg")}
    found |= {f"random {seed}": eval_here("selector=random", f"seed={seed}", *WORDS) for seed in (0, 1)}
    for number, job in enumerate(found.values()):
        plant(job, lambda i, number=number: (i * (number + 2)) % 5 < 3)
    return found


def rows_of(jobs: dict[str, Path], known: Memo | None = None) -> list[Row]:
    return records(read_study_table(jobs["pooled"].parent, known=known).frame)


def test_what_is_known_is_what_is_computed(jobs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rows_of(jobs, Memo())
    table = refresh(jobs["pooled"].parent)
    assert records(table.frame) == plain and len(plain) == 4

    def fail(*_: object) -> None:
        raise AssertionError("this is known")

    for module, name in ((paired, "_deltas"), (study, "_check_samples")):
        monkeypatch.setattr(module, name, fail)
    for name in ("systems._seed_columns", "systems._answers", "overlap.read_kept"):
        monkeypatch.setattr(f"experiments.analysis.{name}", fail)
    again = rows_of(jobs)
    assert again == plain
    assert [list(map(type, row.values())) for row in again] == [list(map(type, row.values())) for row in plain]


def test_a_changed_file_is_seen(jobs: dict[str, Path]) -> None:
    before = {row["job"]: row for row in records(refresh(jobs["pooled"].parent).frame)}
    plant(jobs["full"], lambda i: True)
    quality = result_of(jobs["shirg"])["quality"]
    quality["metrics"]["exact_match"]["mean"] = 0.125
    change_result(jobs["shirg"], quality=quality)
    after = {row["job"]: row for row in rows_of(jobs)}
    assert after == {row["job"]: row for row in rows_of(jobs, Memo())}
    full, shirg = jobs["full"].name, jobs["shirg"].name
    assert before[full]["delta vs pooled mean"] != after[full]["delta vs pooled mean"] == 1 - 15 / 24
    assert after[shirg]["exact_match mean"] == 0.125
    assert before[shirg]["delta vs pooled mean"] == after[shirg]["delta vs pooled mean"]


def torn(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-100])


def edited(cache: Path) -> None:
    cache.write_text(cache.read_text().replace('"mean": ', '"mean": 9'))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn": torn,
    "edited": edited,
    "empty": lambda cache: cache.write_bytes(b""),
    "no text": lambda cache: cache.write_bytes(b"\xff\xfe" * 50),
    "a folder": lambda cache: (cache.unlink(), cache.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_thrown_away(kind: str, tmp_path: Path) -> None:
    cache = tmp_path / memo.NAME
    first = Memo()
    assert first.get("sum", [1, 2], lambda: {"mean": 3.0}) == {"mean": 3.0}
    first.get("padding", [], lambda: "x" * 200)
    first.save(cache)
    assert Memo(cache).get("sum", [1, 2], lambda: {}) == {"mean": 3.0}
    DAMAGES[kind](cache)
    assert Memo(cache).get("sum", [1, 2], lambda: {"mean": 4.0}) == {"mean": 4.0}


def test_other_code_and_what_nobody_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / memo.NAME
    first = Memo()
    for number in range(3):
        first.get("value", [number], lambda number=number: number)
    first.save(cache)
    second = Memo(cache)
    assert second.get("value", [1], lambda: 7) == 1
    second.save(cache)
    assert len(json.loads(cache.read_text().partition("\n")[2])) == 3
    second.save(cache, prune=True)
    assert len(json.loads(cache.read_text().partition("\n")[2])) == 1
    monkeypatch.setattr(memo, "_code", lambda: "another version")
    assert Memo(cache).get("value", [1], lambda: 7) == 7
