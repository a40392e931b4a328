"""The physical floor: counts by hand, rates of this machine, and rows that claim to beat it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.analysis.columns import columns
from experiments.analysis.table import collect
from experiments.profiling import Limits, LmCost, Work, cost_of, flags, known_limits
from lavida_adapter import LavidaConfig
from tests.experiments.conftest import result_of

CPU = torch.device("cpu")
LIMITS = Limits({100: 1000.0, 10_000: 100.0}, matmul=2000.0)


def test_counts_of_the_published_sizes() -> None:
    """Weights read at a step: all but the input embedding, 15.0 GB; a cached token: half a MiB."""
    cost = cost_of(LavidaConfig().lm, torch.bfloat16)
    assert cost.cache_bytes(1) == 2**19
    step = cost.step(0, 32, 32)
    assert step.bytes == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 4096 * cost.vocab)
    assert step.bytes == pytest.approx(15.0e9, rel=0.01)
    assert cost.prefill(1068).flops == pytest.approx(15.1e12, rel=0.01)
    assert cost.step(1068, 32, 32, batch=2).bytes - step.bytes == 2 * 1068 * 2**19


def test_counts_by_hand() -> None:
    cost = LmCost(d_model=4, kv_width=2, mlp=6, n_layers=2, vocab=10, item_bytes=4)
    block = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6
    assert (cost.block_weights, cost.kv_weights) == (block, 16)
    assert cost.prefill(5).flops == 2 * 5 * block + 4 * 25 * 4 + 2 * 5 * 16
    assert cost.prefill(5, batch=3).flops == 3 * cost.prefill(5).flops
    # Two layers for two answer tokens, but the last one's output and the head for one of them.
    products = 2 * 2 * block + (2 * 2 * 16 + 2 * (block - 16)) + 2 * 4 * 10
    assert cost.step(5, 2, 1).flops == products + 4 * (5 + 2) * 4 * (2 + 1)
    assert cost.step(5, 2, 1).bytes == 4 * (2 * block + 40) + cost.cache_bytes(5)


def test_the_floor_is_the_slower_of_moving_and_multiplying() -> None:
    assert LIMITS.floor_ms(Work(flops=2000, bytes=1)) == 1000
    assert LIMITS.floor_ms(Work(flops=1, bytes=200)) == 200
    assert LIMITS.floor_ms(Work(flops=1, bytes=20_000)) == 200_000, "what no cache holds moves slowly"
    assert LIMITS.floor_ms(Work(flops=1, bytes=20_000), lenient=True) == 20_000


def test_what_cannot_be_is_flagged() -> None:
    floor = {"prefill": Work(2000, 0), "denoise": Work(0, 100)}
    times = {"ms_per_sample": {"prefill": 999.0, "denoise": 101.0, "select": 0.0}, "peak_memory_mib": 3.0}
    assert flags(times, 4 * 2**20, LIMITS, floor) == {
        "prefill ms": "999 ms is below the floor of 1e+03 ms",
        "peak memory MiB": "3 MiB is below the 4 MiB of the weights",
    }
    honest = {"ms_per_sample": {"prefill": 1001.0, "denoise": 101.0}, "peak_memory_mib": None}
    assert flags(honest, 4 * 2**20, LIMITS, floor) == {}


def test_limits_are_measured_once(tmp_path: Path) -> None:
    first = known_limits(tmp_path, CPU, torch.float32)
    assert first.matmul > 1e9 and all(rate > 1e8 for rate in first.copy.values())
    assert known_limits(tmp_path, CPU, torch.float32) == first
    assert len(json.loads((tmp_path / "limits.json").read_text())) == 1


def test_a_row_that_beats_its_machine_says_so(eval_here: Callable[..., Path]) -> None:
    job = eval_here("selector=random", "limit=4")
    assert result_of(job)["times"]["flags"] == {}
    assert "flags" not in [c.title for c in columns(collect(job.parent))]
    limits = json.loads((job.parent / "limits.json").read_text())
    for device in limits.values():
        device["matmul"] = 1.0
    (job.parent / "limits.json").write_text(json.dumps(limits))
    job = eval_here("selector=random", "limit=4", "overwrite=true")
    (row,) = collect(job.parent)
    assert row["flags"].count("is below the floor of") == 2
    assert "flags" in [c.title for c in columns([row])]
