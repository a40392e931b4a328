"""How long an answer takes: prefill and denoising steps of each engine, beside the public reference."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.bench import reference
from experiments.bench.common import (
    BenchResult,
    Columns,
    as_prefix,
    load_model,
    only_one,
    prompt_embeds,
    sizes_of,
    table_of,
    times_floor,
    title_of,
)
from experiments.profiling import Limits, cost_of, measure_limits, peak_memory_mib, reset_peak_memory, time_call

if TYPE_CHECKING:
    from lavida_adapter import DecodeConfig, Lavida, Prefix

ELSEWHERE_S = {"bench_small": 0.46, "bench_tiny": 0.069}
"""Seconds of the public reference for a prompt of 1050 and 32 tokens in 32 steps, on one thread of another machine."""
COLUMNS: Columns = {
    "": ("name", ""),
    "ms": ("whole.ms", ".2f"),
    "x plain": ("times_faster", ".2f"),
    "prefill ms": ("prefill.ms", ".2f"),
    "prefill x floor": ("floor.prefill.times_floor", ".2f"),
    "steps": ("forwards", "d"),
    "step ms": ("step_ms", ".2f"),
    "step x floor": ("floor.step.times_floor", ".2f"),
    "same ids": ("same_ids", lambda same: "yes" if same else "NO"),
    "peak MiB": ("peak_mib", ".0f"),
}


def run(
    *,
    device: torch.device,
    model: str,
    prompt: list[int],
    answer: int,
    steps: int | None,
    batch: list[int],
    engine: list[str],
    attention: str,
    repeats: int,
) -> BenchResult:
    n_prompt, size = only_one("decode", "prompt", prompt), only_one("decode", "batch", batch)
    loaded = load_model(model, device, attention)
    return measure(model, loaded, n_prompt, answer, steps or answer, size, engine, repeats)


@torch.inference_mode()
def measure(
    name: str,
    model: "Lavida",
    n_prompt: int,
    n_answer: int,
    steps: int,
    batch: int,
    engines: Sequence[str],
    repeats: int,
) -> BenchResult:
    """The plain implementation of the public reference first, then each engine, one after the other in one process."""
    from lavida_adapter import DecodeConfig
    from lavida_adapter.joined_prompts import kernels_of

    lm, embeds = model.lm, prompt_embeds(model, batch, n_prompt)
    decode = DecodeConfig(max_new_tokens=n_answer, step_per_block=steps)
    limits = measure_limits(model.device, model.dtype)
    mask_id, angles = model.config.lm.mask_token_id, reference.angles_of(lm, n_prompt)
    plain, expected = _row(
        "plain twin",
        lambda: (reference.plain_generate(lm, embeds, decode, mask_id), decode.steps),
        lambda: reference.plain_forward(lm, embeds, None, angles),
        model,
        embeds,
        decode,
        repeats,
        limits,
    )
    rows = [plain | {"same_ids": True}]
    prefix = as_prefix(embeds)
    for engine in engines:
        config = replace(decode, engine=engine)  # type: ignore[arg-type]  # DecodeConfig refuses unknown engines
        row, ids = _row(
            f"engine={engine}",
            lambda c=config: _generated(model, prefix, c),  # type: ignore[misc]
            lambda c=config: model.prefill(prefix, c.max_new_tokens, engine=c.engine),  # type: ignore[misc]
            model,
            embeds,
            config,
            repeats,
            limits,
        )
        rows.append(row | {"same_ids": torch.equal(ids, expected)})
    rows = [row | {"times_faster": rows[0]["whole"]["ms"] / row["whole"]["ms"]} for row in rows]
    attention = kernels_of(lm.backend, embeds.device, embeds.dtype, model.config.lm)
    sizes = sizes_of(model, batch=batch, prompt=n_prompt, answer=n_answer, steps=steps, attention=attention)
    elsewhere = ELSEWHERE_S.get(name)
    note = f"the public reference, on one thread of another machine: {1000 * (elsewhere or 0):.0f} ms"
    report = {"model": name, **sizes, "limits": limits.report(), "reference_elsewhere_s": elsewhere, "rows": rows}
    return BenchResult(title_of(name, sizes), report, table_of(rows, COLUMNS), (note,) if elsewhere else ())


def _generated(model: "Lavida", prefix: "Prefix", decode: "DecodeConfig") -> tuple[Tensor, int]:
    answer = model.generate(prefix, decode)
    return answer.ids_BA, answer.forwards


def mean_open(counts: Sequence[int]) -> float:
    """How many slots are masked at a step that commits some, on average."""
    some = [k for k in counts if k]
    return statistics.mean(sum(some[i:]) for i in range(len(some)))


def _row(
    name: str,
    generate: Callable[[], tuple[Tensor, int]],
    prefill: Callable[[], object],
    model: "Lavida",
    embeds: Tensor,
    decode: "DecodeConfig",
    repeats: int,
    limits: Limits,
) -> tuple[dict[str, Any], Tensor]:
    """The times of one implementation, and the ids that it generates; `generate` returns them and its steps."""
    reset_peak_memory(model.device)
    ids, forwards = generate()
    whole = time_call(generate, model.device, repeats=repeats)
    prefilling = time_call(prefill, model.device, repeats=repeats)
    step_ms = (whole.median - prefilling.median) / forwards
    batch, p = embeds.shape[:2]
    cost = cost_of(model.config.lm, model.dtype)
    # The floor counts what must be computed, whatever an implementation computes: only masked slots need logits.
    masked = mean_open(reference.plain_counts(model.lm, decode))
    row = {
        "name": name,
        "whole": whole.report(),
        "prefill": prefilling.report(),
        "forwards": forwards,
        "step_ms": step_ms,
        "peak_mib": peak_memory_mib(model.device),
        "floor": {
            "prefill": times_floor(limits, prefilling.median, cost.prefill(p, batch)),
            "step": times_floor(limits, step_ms, cost.step(p, decode.max_new_tokens, masked, batch)),
        },
    }
    return row, ids
