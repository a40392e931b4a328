"""Prefill of a batch of unequal prompts: padded and masked, and one behind the other without padding."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.bench.common import (
    BenchResult,
    Columns,
    load_model,
    prompt_embeds,
    sizes_of,
    table_of,
    times_floor,
    title_of,
)
from experiments.bench.recorder import time_ms
from experiments.profiling import Work, cost_of, measure_limits, peak_memory_mib, reset_peak_memory

if TYPE_CHECKING:
    from lavida_adapter import Lavida
    from lavida_adapter.kv_cache import PrefixCache

COLUMNS: Columns = {
    "prefill": ("name", ""),
    "ms": ("ms", ".2f"),
    "least ms": ("ms_min", ".2f"),
    "x floor": ("floor.times_floor", ".2f"),
    "times faster": ("times_faster", ".2f"),
    "peak MiB": ("peak_mib", ".0f"),
    "difference": ("difference", ".1e"),
}


def run(
    *,
    device: torch.device,
    model: str,
    prompt: list[int],
    answer: int,
    engine: list[str],
    attention: str,
    repeats: int,
) -> BenchResult:
    return measure(model, load_model(model, device, attention), prompt, answer, engine, repeats)


@torch.inference_mode()
def measure(
    name: str, model: "Lavida", lengths: Sequence[int], n_answer: int, engines: Sequence[str], repeats: int
) -> BenchResult:
    """`lengths`: tokens of each prompt of the batch. All ways take turns; "times faster" is over the first one."""
    from lavida_adapter.joined_prompts import kernels_of

    mask_BP = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask_BP = mask_BP.to(model.device)
    embeds_BPD = prompt_embeds(model, len(lengths), max(lengths)) * mask_BP[..., None]
    calls: dict[str, Callable[[], PrefixCache]] = {}
    for name_of_engine in engines:
        engine = model._engine(name_of_engine)  # type: ignore[arg-type]  # it refuses what a device lacks
        given = embeds_BPD, mask_BP, None, n_answer, None
        calls[f"{name_of_engine}, padded"] = partial(engine.prefill, *given)
        calls[f"{name_of_engine}, joined"] = partial(engine.prefill, *given, tuple(lengths))
    keys_BGPD = next(iter(calls.values()))().keys[-1].clone()
    differences = {way: difference(call().keys[-1], keys_BGPD, mask_BP) for way, call in calls.items()}
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(repeats):
        for way, call in calls.items():
            times[way].append(time_ms(call, model.device))
    limits, work = measure_limits(model.device, model.dtype), least_work(model, lengths)
    rows: list[dict[str, Any]] = []
    for way, ms in times.items():
        reset_peak_memory(model.device)
        calls[way]()
        median = statistics.median(ms)
        rows.append(
            {
                "name": way,
                "ms": median,
                "ms_min": min(ms),
                "ms_all": ms,
                "floor": times_floor(limits, median, work),
                "times_faster": statistics.median(times[next(iter(calls))]) / median,
                "peak_mib": peak_memory_mib(model.device),
                "difference": differences[way],
            }
        )
    kernels = kernels_of(model.lm.backend, model.device, model.dtype, model.config.lm, ["joined", "padded"])
    share = sum(lengths) / (len(lengths) * max(lengths))
    sizes = sizes_of(model, prompts=list(lengths), answer=n_answer)
    report = {"model": name, **sizes, "attention": kernels, "share_of_tokens": share, "limits": limits.report()}
    notes = (f"tokens: {share:.0%} of the slots, the rest is padding", f"attention: {kernels}")
    return BenchResult(title_of(name, sizes), report | {"rows": rows}, table_of(rows, COLUMNS), notes)


def difference(found_BGPD: Tensor, expected_BGPD: Tensor, mask_BP: Tensor) -> float:
    """Distance of the last layer's keys without padding, relative to their norm."""
    found, expected = ((x * mask_BP[:, None, :, None]).float() for x in (found_BGPD, expected_BGPD))
    return float((found - expected).norm() / expected.norm())


def least_work(model: "Lavida", lengths: Sequence[int]) -> Work:
    """That of each prompt alone, but weights are read once."""
    cost = cost_of(model.config.lm, model.dtype)
    each = [cost.prefill(n) for n in lengths]
    weights = each[0].bytes - cost.cache_bytes(lengths[0], 1)
    return Work(sum(work.flops for work in each), weights + sum(cost.cache_bytes(n, 1) for n in lengths))
