"""Shards of one dataset become one row, the one that an undivided job writes."""

from collections.abc import Callable
from pathlib import Path

from tests.experiments.conftest import result_of, rows_of

Eval = Callable[..., Path]
SYSTEM = ("selector=shirg", "data.n=25", "study=s", "shots=2", "threads=1")


def test_shards_equal_the_whole(eval_here: Eval) -> None:
    whole = eval_here(*SYSTEM)
    for shard in (2, 0, 1):
        assert not (whole.parent / "eval_data.n-25_selector-shirg_shards-3").exists()
        part = eval_here(*SYSTEM, "shards=3", f"shard={shard}")
    merged = part.parent / part.name.replace(f"_shard-{shard}", "")
    assert [{**row, "batch": 0} for row in rows_of(merged)] == [{**row, "batch": 0} for row in rows_of(whole)]
    ours, theirs = result_of(merged), result_of(whole)
    same = ("quality", "tokens", "data", "config", "config_hash", "model", "selector", "status")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert "shard=0,1,2" in ours["command"] and ours["command"].startswith("python eval.py -m ")
    assert sorted(p.name for p in (merged / "shots").iterdir()) == sorted(p.name for p in (whole / "shots").iterdir())
    table = (whole.parent / "table.csv").read_text().splitlines()
    assert len(table) == 3, "a header, the whole and the merged row; no row for a shard"


def test_a_shard_by_itself_says_so(eval_here: Eval) -> None:
    folder = eval_here(*SYSTEM, "shards=2", "shard=1")
    assert "shard 1 of 2" in (folder.parent / "table.md").read_text()
