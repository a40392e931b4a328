"""How the cost of a prompt grows with its vision tokens: selection, prefill, denoising step; with fitted exponents."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments import build
from experiments.bench import reference
from experiments.bench.common import (
    BenchResult,
    Columns,
    Floors,
    load_model,
    only_one,
    prompt_embeds,
    say,
    sizes_of,
    square_features,
    table_of,
    time_in_turns,
    times_floor,
    title_of,
)
from experiments.profiling import Timing, cost_of, peak_memory_mib, reset_peak_memory, time_call

if TYPE_CHECKING:
    from lavida_adapter import Lavida

KEPT = 980
"""Tokens that the selector keeps of every picture, whatever its size."""
STAGES = ("select", "prefill", "plain prefill", "step")
"""Stages that are timed; "plain prefill" is that of the plain implementation in experiments.bench.reference."""
DRAWN = ("select", "prefill", "step")
"""Stages of the figure."""
COLUMNS: Columns = {
    "tokens": ("tokens", "d"),
    **{f"{stage} ms": (f"{stage}.ms", ".2f") for stage in STAGES},
    "prefill x floor": ("floor.prefill.times_floor", times_floor),
    "step x floor": ("floor.step.times_floor", times_floor),
    "peak MiB": ("peak_mib", ".0f"),
}


def run(
    *,
    device: torch.device,
    model: str,
    prompt: list[int],
    answer: int,
    batch: list[int],
    selector: str,
    attention: str,
    repeats: int,
) -> BenchResult:
    size = only_one("prefill", "batch", batch)
    return measure(model, load_model(model, device, attention), prompt, answer, size, selector, repeats)


@torch.inference_mode()
def measure(
    name: str, model: "Lavida", tokens: Sequence[int], n_answer: int, batch: int, selector: str, repeats: int
) -> BenchResult:
    floors, cost = Floors(model.device, model.dtype), cost_of(model.config.lm, model.dtype)
    rows: list[dict[str, Any]] = []
    for n in tokens:
        say(f"{n} vision tokens")
        reset_peak_memory(model.device)
        times = {
            "select": time_select(model, selector, n, batch, repeats),
            **time_lm(model, n, n_answer, batch, repeats),
        }
        work = {"prefill": cost.prefill(n, batch), "step": cost.step(n, n_answer, n_answer, batch)}
        rows.append(
            {
                "tokens": n,
                **{stage: timing.report() for stage, timing in times.items()},
                "floor": {stage: floors.over(times[stage].median, least) for stage, least in work.items()},
                "peak_mib": peak_memory_mib(model.device),
            }
        )
    sizes = sizes_of(model, batch=batch, answer=n_answer, selector=selector)
    limits, notes = floors.settle()
    report: dict[str, Any] = {"model": name, **sizes, "limits": limits, "exponents": None, "rows": rows}
    figure = None
    if len(tokens) > 1:
        medians = {stage: [row[stage]["ms"] for row in rows] for stage in STAGES}
        report["exponents"] = exponents = {stage: exponent(tokens, ms) for stage, ms in medians.items()}
        notes += ("exponents: " + ", ".join(f"{stage} {value:.2f}" for stage, value in exponents.items()),)
        figure = loglog_figure(tokens, {f"{s} ~ N^{exponents[s]:.2f}": medians[s] for s in DRAWN})
    return BenchResult(title_of(name, sizes), report, table_of(rows, COLUMNS), notes, figure)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of a least-squares line through (log x, log y)."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def loglog_figure(tokens: Sequence[int], series: Mapping[str, Sequence[float]]) -> Figure:
    """Milliseconds over vision tokens on logarithmic axes, one line for each series."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, ms in series.items():
        axes.loglog(tokens, ms, marker="o", label=name)
    axes.set_xticks(list(tokens), [str(n) for n in tokens])
    axes.minorticks_off()
    axes.set_xlabel("vision tokens N")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.4)
    axes.legend()
    return figure


def time_lm(model: "Lavida", n: int, n_answer: int, batch: int, repeats: int) -> dict[str, Timing]:
    """Prefill and one step over a prompt of `n` tokens, and the plain prefill."""
    from lavida_adapter.engine import DecodeSteps

    lm, embeds, device = model.lm, prompt_embeds(model, batch, n), model.device
    steps = DecodeSteps(lm, lm.prefill(embeds, n_answer=n_answer), n_answer)
    ids = torch.full((batch, n_answer), lm.config.mask_token_id, device=device)
    angles = reference.angles_of(lm, n)
    prefills = {
        "prefill": lambda: lm.prefill(embeds, n_answer=n_answer),
        "plain prefill": lambda: reference.plain_forward(lm, embeds, None, angles),
    }
    return {
        **time_in_turns(prefills, device, repeats=repeats, warm_up=1),
        "step": time_call(lambda: steps(ids), device, repeats=max(repeats, 5)),
    }


def time_select(model: "Lavida", name: str, n: int, batch: int, repeats: int) -> Timing:
    """Selection among about `n` tokens: one square view of them with its own grid."""
    budget = min(KEPT, n // 2)
    cfg = build.compose_eval(f"selector={name}", f"budget={budget}")
    selector = build.build_selector(cfg, model.config.budgets).to(model.device).eval()
    features = square_features(n, batch, model.config.vision.hidden_size, model.device, model.dtype)
    return time_call(lambda: selector(features), model.device, repeats=max(repeats, 5))
