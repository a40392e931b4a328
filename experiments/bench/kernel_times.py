"""Where the time of a stage goes on a GPU: its slowest kernels; a part of `experiments.bench.true_size`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.bench.recorder import Bench
from experiments.bench.stage_times import ENGINES, prefix_of
from lavida_adapter.encode import run_tower

MOST = 12
"""Kernels that are listed."""


def measure_kernels(bench: Bench) -> None:
    """The slowest kernels of the tower, the prefill and one step, at the largest batch."""
    batch = max(bench.batches)
    for name, prepare in {"tower": tower_of, "prefill": prefill_of, "step": step_of}.items():
        key = {"part": "kernels", "lm": bench.lm, "batch": batch, "name": name}
        if bench.device.type != "cuda":
            bench.recorder.put(key, {"skipped": "needs CUDA"})
            continue
        found = bench.recorder.measure(key, partial(_slowest, bench, prepare, batch))
        if found is not None:
            bench.recorder.put(key, found)


def tower_of(bench: Bench, batch: int) -> Callable[[], object]:
    return partial(run_tower, bench.model, list(bench.views[:batch]), frozenset())


def prefill_of(bench: Bench, batch: int) -> Callable[[], object]:
    """With the last engine of the bench."""
    prefix = prefix_of(bench, "P1", batch)
    engine = ENGINES[bench.engines[-1]](bench.model.lm)
    return lambda: engine.prefill(prefix.embeds_BPD, prefix.padding, None, bench.n_answer, None)


def step_of(bench: Bench, batch: int) -> Callable[[], object]:
    """With the last engine of the bench."""
    prefix = prefix_of(bench, "P1", batch)
    engine = ENGINES[bench.engines[-1]](bench.model.lm)
    steps = engine.steps(engine.prefill(prefix.embeds_BPD, prefix.padding, None, bench.n_answer, None), bench.n_answer)
    ids_BA = torch.full((batch, bench.n_answer), bench.model.config.lm.mask_token_id, device=bench.device)
    want_BM = torch.arange(bench.n_answer, device=bench.device).expand(batch, -1).contiguous()
    return lambda: steps(ids_BA, want_BM)


def _slowest(bench: Bench, prepare: Callable[[Bench, int], Callable[[], object]], batch: int) -> dict[str, Any]:
    call = prepare(bench, batch)
    for _ in range(2):
        call()
    torch.cuda.synchronize(bench.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(bench.device)
    kernels = sorted(profiled.key_averages(), key=lambda one: -one.self_device_time_total)
    listed = [[one.key[:90], one.self_device_time_total / 1000, one.count] for one in kernels[:MOST]]
    return {"ms": {"all": sum(one.self_device_time_total for one in kernels) / 1000}, "n": 1, "kernels": listed}
