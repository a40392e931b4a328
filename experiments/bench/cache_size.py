"""The costs and savings of a smaller prefix cache: bytes, milliseconds to compress and to read it, change of logits."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from experiments.bench.common import (
    BenchResult,
    Columns,
    Floors,
    as_prefix,
    load_model,
    mib,
    only_one,
    prompt_embeds,
    sizes_of,
    table_of,
    time_in_turns,
    times_floor,
    title_of,
)
from experiments.profiling import cost_of, time_call

if TYPE_CHECKING:
    from lavida_adapter import CachePacker, Lavida

COLUMNS: Columns = {
    "cache": ("cache", ""),
    "MiB": ("bytes", mib),
    "saved": ("saved", ".1%"),
    "pack ms": ("pack.ms", ".2f"),
    "step ms": ("step.ms", ".2f"),
    "x floor": ("floor.times_floor", times_floor),
    "max logit drift": ("max_logit_drift", ".2g"),
    "same top-1": ("same_top1", ".1%"),
}


def run(
    *, device: torch.device, model: str, prompt: list[int], answer: int, batch: list[int], repeats: int
) -> BenchResult:
    n_prompt, size = only_one("cache", "prompt", prompt), only_one("cache", "batch", batch)
    return measure(model, load_model(model, device), n_prompt, answer, size, repeats)


@torch.inference_mode()
def measure(name: str, model: "Lavida", n_prompt: int, n_answer: int, batch: int, repeats: int) -> BenchResult:
    """The whole cache first, then each packer; all decode the same step from the same prompt, in turns."""
    from experiments.inference import drift
    from lavida_adapter import Cast, Fp8, Int8
    from lavida_adapter.engine import DecodeSteps

    packers: dict[str, CachePacker | None] = {"none": None, "cast": Cast(), "int8": Int8(), "fp8": Fp8()}
    prefix = as_prefix(prompt_embeds(model, batch, n_prompt))
    whole = model.prefill(prefix)
    floors, cost = Floors(model.device, model.dtype), cost_of(model.config.lm, model.dtype)
    ids = torch.full((batch, n_answer), model.config.lm.mask_token_id, device=model.device)
    stored_as = {label: whole if p is None else p(whole, prefix, None) for label, p in packers.items()}
    steps = {label: partial(DecodeSteps(model.lm, cache, n_answer), ids) for label, cache in stored_as.items()}
    times = time_in_turns(steps, model.device, repeats=repeats)
    rows = []
    for label, packer in packers.items():
        stored, step, pack = stored_as[label], times[label], None
        if packer is not None:
            pack = time_call(lambda p=packer: p(whole, prefix, None), model.device, repeats=repeats)  # type: ignore[misc]
        work = cost.step(n_prompt, n_answer, n_answer, batch, cache_bytes=stored.n_bytes)
        moved = drift(model.lm, whole, stored, n_answer)
        rows.append(
            {
                "cache": label,
                "bytes": stored.n_bytes,
                "saved": 1 - stored.n_bytes / whole.n_bytes,
                "pack": None if pack is None else pack.report(),
                "step": step.report(),
                "floor": floors.over(step.median, work),
                "max_logit_drift": max(moved.most),
                "same_top1": sum(moved.same_top1) / batch,
            }
        )
    sizes = sizes_of(model, batch=batch, prompt=n_prompt, answer=n_answer)
    limits, doubts = floors.settle()
    report = {"model": name, **sizes, "limits": limits, "rows": rows}
    return BenchResult(title_of(name, sizes), report, table_of(rows, COLUMNS), doubts)
