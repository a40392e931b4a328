"""How long an answer takes: prefill and denoising steps of each engine, beside the public reference."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.bench import reference
from experiments.bench.common import (
    BenchResult,
    Columns,
    Floors,
    as_prefix,
    load_model,
    only_one,
    prompt_embeds,
    sizes_of,
    table_of,
    time_in_turns,
    times_floor,
    title_of,
)
from experiments.profiling import cost_of, peak_memory_mib, reset_peak_memory

if TYPE_CHECKING:
    from lavida_adapter import DecodeConfig, Lavida, Prefix

ELSEWHERE_S = {"bench_small": 0.46, "bench_tiny": 0.069}
"""Seconds of the public reference for a prompt of 1050 and 32 tokens in 32 steps, on one thread of another machine."""
COLUMNS: Columns = {
    "": ("name", ""),
    "ms": ("whole.ms", ".2f"),
    "x plain": ("times_faster", ".2f"),
    "prefill ms": ("prefill.ms", ".2f"),
    "prefill x floor": ("floor.prefill.times_floor", times_floor),
    "steps": ("forwards", "d"),
    "step ms": ("step_ms", ".2f"),
    "step x floor": ("floor.step.times_floor", times_floor),
    "same ids": ("same_ids", lambda same: "yes" if same else "NO"),
    "peak MiB": ("peak_mib", ".0f"),
}


def run(
    *,
    device: torch.device,
    model: str,
    dtype: str | None,
    prompt: list[int],
    answer: int,
    steps: int | None,
    batch: list[int],
    engine: list[str],
    attention: str,
    repeats: int,
) -> BenchResult:
    n_prompt, size = only_one("decode", "prompt", prompt), only_one("decode", "batch", batch)
    loaded = load_model(model, device, attention, dtype)
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
    """The plain implementation of the public reference and each engine, in turns in one process.

    The device's limits are measured before and after; the better of both counts.
    """
    from lavida_adapter import DecodeConfig
    from lavida_adapter.joined_prompts import kernels_of

    lm, embeds = model.lm, prompt_embeds(model, batch, n_prompt)
    decode = DecodeConfig(max_new_tokens=n_answer, step_per_block=steps)
    floors = Floors(model.device, model.dtype)
    calls = {"plain twin": _plain(model, embeds, decode)} | {
        f"engine={engine}": _engine(model, embeds, replace(decode, engine=engine))  # type: ignore[arg-type]
        for engine in engines  # DecodeConfig refuses unknown ones
    }
    answers, peaks = {}, {}
    for way, (generate, _) in calls.items():
        reset_peak_memory(model.device)
        answers[way] = generate()
        peaks[way] = peak_memory_mib(model.device)
    stages = {(way, i): call for way, both in calls.items() for i, call in enumerate(both)}
    timings = time_in_turns(stages, model.device, repeats=repeats)
    cost = cost_of(model.config.lm, model.dtype)
    # The floor counts what must be computed, whatever an implementation computes: only masked slots need logits.
    masked = mean_open(reference.plain_counts(lm, decode))
    work = cost.prefill(n_prompt, batch), cost.step(n_prompt, n_answer, masked, batch)
    rows = []
    for way, (ids, forwards) in answers.items():
        whole, prefill = timings[way, 0], timings[way, 1]
        step_ms = (whole.median - prefill.median) / forwards
        over = (floors.over(ms, least) for ms, least in zip((prefill.median, step_ms), work, strict=True))
        rows.append(
            {
                "name": way,
                "whole": whole.report(),
                "prefill": prefill.report(),
                "forwards": forwards,
                "step_ms": step_ms,
                "peak_mib": peaks[way],
                "floor": dict(zip(("prefill", "step"), over, strict=True)),
                "same_ids": torch.equal(ids, answers["plain twin"][0]),
                "times_faster": timings["plain twin", 0].median / whole.median,
            }
        )
    at = lm.backend, embeds.device, embeds.dtype, model.config.lm
    attention = {engine: kernels_of(*at, replayed=engine != "eager") for engine in engines}
    sizes = sizes_of(model, batch=batch, prompt=n_prompt, answer=n_answer, steps=steps)
    elsewhere = ELSEWHERE_S.get(name)
    limits, doubts = floors.settle()
    notes = [*doubts, *(f"attention of engine={engine}: {kernels}" for engine, kernels in attention.items())]
    if elsewhere:
        notes.append(f"the public reference, on one thread of another machine: {1000 * elsewhere:.0f} ms")
    report = {"model": name, **sizes, "attention": attention, "limits": limits}
    report |= {"reference_elsewhere_s": elsewhere, "rows": rows}
    return BenchResult(title_of(name, sizes), report, table_of(rows, COLUMNS), tuple(notes))


Calls = tuple[Callable[[], tuple[Tensor, int]], Callable[[], object]]
"""A whole answer, which gives the ids and the number of steps, and its prefill alone."""


def _plain(model: "Lavida", embeds: Tensor, decode: "DecodeConfig") -> Calls:
    lm, mask_id = model.lm, model.config.lm.mask_token_id
    angles = reference.angles_of(lm, embeds.shape[1])
    return (
        lambda: (reference.plain_generate(lm, embeds, decode, mask_id), decode.steps),
        lambda: reference.plain_forward(lm, embeds, None, angles),
    )


def _engine(model: "Lavida", embeds: Tensor, decode: "DecodeConfig") -> Calls:
    prefix = as_prefix(embeds)
    return (
        lambda: _generated(model, prefix, decode),
        lambda: model.prefill(prefix, decode.max_new_tokens, engine=decode.engine),
    )


def _generated(model: "Lavida", prefix: "Prefix", decode: "DecodeConfig") -> tuple[Tensor, int]:
    answer = model.generate(prefix, decode)
    return answer.ids_BA, answer.forwards


def mean_open(counts: Sequence[int]) -> float:
    """How many slots are masked at a step that commits some, on average."""
    some = [k for k in counts if k]
    return statistics.mean(sum(some[i:]) for i in range(len(some)))
