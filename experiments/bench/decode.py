"""How long an answer takes: prefill and denoising steps, beside a plain twin of the public reference and the floor."""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.bench import reference
from experiments.bench.common import Floor, Timing, aligned, load_model, prompt_embeds, table_title, time_call
from experiments.profiling import cost_of, peak_memory_mib, reset_peak_memory
from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter import DecodeConfig, Lavida, Prefix

ELSEWHERE_S = {"bench_small": 0.46, "bench_tiny": 0.069}
"""What the public reference took for a prompt of 1050 and 32 tokens in 32 steps, on one thread of another machine."""


@dataclass(frozen=True)
class DecodeRow:
    """One way of computing the same answers."""

    name: str
    whole: Timing
    """Prefill and all steps."""
    prefill: Timing
    step_ms: float
    """Of the whole without the prefill, by step."""
    same_ids: bool
    peak_mib: float | None
    floor: dict[str, dict[str, Any]]

    def report(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "whole": self.whole.report(),
            "prefill": self.prefill.report(),
            "step_ms": self.step_ms,
            "same_ids": self.same_ids,
            "peak_mib": self.peak_mib,
            "floor": self.floor,
        }


@dataclass(frozen=True)
class DecodeBench:
    model: str
    shape: dict[str, Any]
    rows: list[DecodeRow]
    limits: dict[str, Any]

    def report(self) -> dict[str, Any]:
        rows = [row.report() | {"times_faster": self.rows[0].whole.median / row.whole.median} for row in self.rows]
        return {
            "model": self.model,
            **self.shape,
            "limits": self.limits,
            "reference_elsewhere_s": ELSEWHERE_S.get(self.model),
            "rows": rows,
        }

    def lines(self) -> list[str]:
        head = ("", "ms", "x plain", "prefill ms", "x floor", "step ms", "x floor", "same ids", "peak MiB")
        body = []
        for row in self.rows:
            cells = (row.whole.median, self.rows[0].whole.median / row.whole.median, row.prefill.median)
            steps = (row.floor["prefill"]["times_floor"], row.step_ms, row.floor["step"]["times_floor"])
            peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
            body.append((row.name, *(f"{c:.2f}" for c in (*cells, *steps)), "yes" if row.same_ids else "NO", peak))
        lines = [table_title(self.model, self.shape)]
        lines += aligned([head, *body])
        if self.model in ELSEWHERE_S:
            ms = 1000 * ELSEWHERE_S[self.model]
            lines.append(f"the public reference, on one thread of another machine: {ms:.0f} ms")
        return lines


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
) -> DecodeBench:
    if len(prompt) > 1 or len(batch) > 1:
        raise UserError("bench decode takes one prompt length and one batch size: give --prompt and --batch once")
    return bench(
        model, load_model(model, device, attention), prompt[0], answer, steps or answer, batch[0], engine, repeats
    )


@torch.inference_mode()
def bench(
    name: str, model: "Lavida", n_prompt: int, n_answer: int, steps: int, batch: int, engines: list[str], repeats: int
) -> DecodeBench:
    """The plain twin first, then each engine; all in one process, one after the other."""
    from lavida_adapter import DecodeConfig
    from lavida_adapter.llada import kernel_of

    embeds = prompt_embeds(model, batch, n_prompt)
    decode = DecodeConfig(max_new_tokens=n_answer, step_per_block=steps)
    floor = Floor.of(model.device, model.dtype)
    rows = [_plain_row(model, embeds, decode, repeats, floor)]
    expected = rows[0][1]
    for engine in engines:
        rows.append(_row(model, embeds, decode, engine, repeats, floor, expected))
    shape = {
        "batch": batch,
        "prompt": n_prompt,
        "answer": n_answer,
        "steps": steps,
        "attention": kernel_of(model.lm.backend, embeds.device, embeds.dtype, model.config.lm),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return DecodeBench(name, shape, [row for row, _ in rows], floor.limits.report())


def _plain_row(
    model: "Lavida", embeds: Tensor, decode: "DecodeConfig", repeats: int, floor: Floor
) -> tuple[DecodeRow, Tensor]:
    lm, mask_id = model.lm, model.config.lm.mask_token_id
    angles = reference.angles_of(lm, embeds.shape[1])
    reset_peak_memory(model.device)
    whole = time_call(lambda: reference.plain_generate(lm, embeds, decode, mask_id), model.device, repeats=repeats)
    prefill = time_call(lambda: reference.plain_forward(lm, embeds, None, angles), model.device, repeats=repeats)
    ids = reference.plain_generate(lm, embeds, decode, mask_id)
    return _made("plain twin", model, embeds, decode, whole, prefill, floor, same_ids=True), ids


def _row(
    model: "Lavida",
    embeds: Tensor,
    decode: "DecodeConfig",
    engine: str,
    repeats: int,
    floor: Floor,
    expected: Tensor,
) -> tuple[DecodeRow, Tensor]:
    from dataclasses import replace

    config = replace(decode, engine=engine)  # type: ignore[arg-type]  # DecodeConfig refuses what it does not know
    prefix = as_prefix(embeds)
    reset_peak_memory(model.device)
    ids = model.generate(prefix, config).ids_BA
    whole = time_call(lambda: model.generate(prefix, config), model.device, repeats=repeats)
    prefill = time_call(
        lambda: model.prefill(prefix, config.max_new_tokens, engine=config.engine), model.device, repeats=repeats
    )
    same = torch.equal(ids, expected)
    return _made(f"engine={engine}", model, embeds, config, whole, prefill, floor, same_ids=same), ids


def _made(
    name: str,
    model: "Lavida",
    embeds: Tensor,
    decode: "DecodeConfig",
    whole: Timing,
    prefill: Timing,
    floor: Floor,
    *,
    same_ids: bool,
) -> DecodeRow:
    batch, p = embeds.shape[:2]
    step_ms = (whole.median - prefill.median) / decode.steps
    cost = cost_of(model.config.lm, model.dtype)
    # What must be computed, not what a way of computing happens to compute: masked slots alone need logits.
    masked = statistics.mean(range(1, decode.max_new_tokens + 1))
    floors = {
        "prefill": floor.row(prefill.median, cost.prefill(p, batch)),
        "step": floor.row(step_ms, cost.step(p, decode.max_new_tokens, masked, batch)),
    }
    return DecodeRow(name, whole, prefill, step_ms, same_ids, peak_memory_mib(model.device), floors)


def as_prefix(embeds_BPD: Tensor) -> "Prefix":
    """A prefix without padding and without a picture."""
    from lavida_adapter import Prefix

    here = torch.ones(embeds_BPD.shape[:2], dtype=torch.bool, device=embeds_BPD.device)
    return Prefix(embeds_BPD, here, ~here)
