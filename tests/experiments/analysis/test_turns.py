"""Who writes a study's files: one process at a time, once a minute at most, with all jobs that have ended."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from experiments.analysis import memo, turns
from experiments.analysis.memo import Memo
from experiments.analysis.table import collect
from experiments.report.publish import publish, refresh_report
from experiments.schema import CONF
from tests.experiments.planting import plant

Eval = Callable[..., Path]


@pytest.mark.parametrize(
    ("took", "ago", "due"),
    [
        ("0.9", 59, False),
        ("0.9", 61, True),
        ("20.0", 179, False),
        ("20.0", 181, True),
        ("x", 1, True),
        ("9", -99, True),
    ],
)
def test_table_and_page_are_written_once_a_minute_or_a_tenth_of_the_time(
    took: str, ago: float, due: bool, tmp_path: Path
) -> None:
    assert turns.is_due(tmp_path), "never written"
    last = tmp_path / turns.LAST_REFRESH
    last.write_text(took)
    os.utime(last, (time.time() - ago,) * 2)
    assert turns.is_due(tmp_path) is due


def test_a_request_during_a_turn_is_served_by_the_same_process(tmp_path: Path) -> None:
    calls = []

    def write() -> int:
        calls.append(1)
        if len(calls) == 1:  # another process ends a job now, and finds the lock held
            with pytest.raises(TimeoutError):
                FileLock(tmp_path / ".table.lock").acquire(timeout=0)
            (tmp_path / ".table_wanted").touch()
        return len(calls)

    assert turns.in_turn(tmp_path, write, wait_s=0) == 2 == len(calls)
    assert not (tmp_path / ".table_wanted").exists() and not turns.is_due(tmp_path)


def test_nobody_waits_for_a_lock_that_is_held(eval_here: Eval, capfd: pytest.CaptureFixture[str]) -> None:
    study = eval_here("selector=pooled", "limit=6", "shots=0").parent
    (study / turns.LAST_REFRESH).unlink()
    written = (study / "table.csv").stat().st_mtime_ns
    with FileLock(study / ".table.lock"):
        refresh_report(study)
        assert turns.in_turn(study, lambda: 1, wait_s=0) is None
    assert (study / "table.csv").stat().st_mtime_ns == written
    assert (study / ".table_wanted").exists(), "the holder, or the next command, writes it"
    assert publish(study) == [study / "report.html"]
    assert not (study / ".table_wanted").exists()


def test_two_processes_at_once_leave_one_whole_study(eval_here: Eval) -> None:
    for selector in ("pooled", "random", "full"):
        job = eval_here(f"selector={selector}", "data.n=12", "shots=0")
    study = job.parent
    plant(job, lambda i: i % 2 == 0)
    code = "import sys, pathlib; from experiments.report.publish import publish; publish(pathlib.Path(sys.argv[1]))"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(study)], cwd=CONF.parent) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    header, *lines = (study / "table.csv").read_text().splitlines()
    assert len(lines) == 3 and "overlap" in header
    plain = {row["job"]: row for row in collect(study)}
    assert all(any(job in line for line in lines) for job in plain)
    assert Memo(study / memo.NAME)._known
    assert not [path.name for path in study.glob(".*") if path.name.endswith(".tmp") or "wanted" in path.name]
