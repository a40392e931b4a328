"""Prefill of a batch of unequal prompts: padded and masked, and one behind the other without padding."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from experiments.bench.common import (
    BenchResult,
    Columns,
    Floors,
    load_model,
    prompt_embeds,
    sizes_of,
    table_of,
    times_floor,
    title_of,
)
from experiments.bench.recorder import time_ms
from experiments.bench.unequal_stage import calls_of, difference, least_work
from experiments.profiling import cost_of, peak_memory_mib, reset_peak_memory

if TYPE_CHECKING:
    from lavida_adapter import Lavida

COLUMNS: Columns = {
    "prefill": ("name", ""),
    "ms": ("ms", ".2f"),
    "least ms": ("ms_min", ".2f"),
    "x floor": ("floor.times_floor", times_floor),
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

    runs = {engine: model._engine(engine) for engine in engines}  # type: ignore[arg-type]  # it refuses unknown ones
    embeds_BPD = prompt_embeds(model, len(lengths), max(lengths))
    calls = {f"{name}, {way}": call for (name, way), call in calls_of(runs, embeds_BPD, lengths, n_answer).items()}
    keys_BGPD = next(iter(calls.values()))().keys[-1].clone()
    differences = {way: difference(call(), keys_BGPD) for way, call in calls.items()}
    floors = Floors(model.device, model.dtype)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(repeats):
        for way, call in calls.items():
            times[way].append(time_ms(call, model.device))
    work = least_work(cost_of(model.config.lm, model.dtype), lengths)
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
                "floor": floors.over(median, work),
                "times_faster": statistics.median(times[next(iter(calls))]) / median,
                "peak_mib": peak_memory_mib(model.device),
                "difference": differences[way],
            }
        )
    kernels = kernels_of(model.lm.backend, model.device, model.dtype, model.config.lm, ["joined", "padded"])
    share = sum(lengths) / (len(lengths) * max(lengths))
    sizes = sizes_of(model, prompts=list(lengths), answer=n_answer)
    limits, doubts = floors.settle()
    report = {"model": name, **sizes, "attention": kernels, "share_of_tokens": share, "limits": limits}
    notes = (*doubts, f"tokens: {share:.0%} of the slots, the rest is padding", f"attention: {kernels}")
    return BenchResult(title_of(name, sizes), report | {"rows": rows}, table_of(rows, COLUMNS), notes)
