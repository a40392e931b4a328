"""Medians, quartiles, and how long a process waited for a core."""

from pathlib import Path

import numpy as np
import pytest

from experiments.measured_times import BUSY, LoadMeter, is_busy, summarise_stages


def test_few_batches_have_a_median_and_more_have_quartiles() -> None:
    got = summarise_stages({"a": np.asarray([1.0, 2.0, 9.0]), "b": np.asarray([3.0, 2.0, 1.0])})
    assert got == {"ms_per_sample": {"a": 2.0, "b": 2.0, "total": 4.0}, "batches_timed": 3}
    got = summarise_stages({"a": np.asarray([1.0, 2.0, 3.0, 4.0, 5.0])})
    assert got["ms_quartiles"] == {"a": [2.0, 4.0], "total": [2.0, 4.0]}


def test_the_thread_that_waited_most_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 20.0, 30.0])
    monkeypatch.setattr("experiments.measured_times.time.perf_counter", lambda: next(now))

    def wait(**seconds: float) -> None:
        for thread, waited in seconds.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"123 {int(1e9 * waited)} 7\n")

    wait(main=5.0, other=1.0)
    meter = LoadMeter(tmp_path)
    wait(main=5.2, other=2.0, late=0.5)
    assert meter.waited() == pytest.approx(0.1), "one second of ten"
    (tmp_path / "main" / "schedstat").write_text("torn")
    assert meter.waited() == pytest.approx(1.0 / 20)
    assert is_busy(0.1) and not is_busy(BUSY) and not is_busy(None)


def test_where_nothing_is_counted_nothing_is_known(tmp_path: Path) -> None:
    assert LoadMeter(tmp_path / "absent").waited() is None
