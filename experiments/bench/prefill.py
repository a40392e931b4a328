"""How the cost of a prompt grows with its vision tokens: selection, prefill, denoising step; with fitted exponents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from experiments.bench import reference
from experiments.bench.common import (
    Floor,
    Timing,
    aligned,
    config_of,
    load_model,
    loglog_chart,
    prompt_embeds,
    table_title,
    time_call,
)
from experiments.profiling import Work, cost_of, peak_memory_mib, reset_peak_memory
from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter import Lavida

KEPT = 980
"""What the selector keeps of every picture, whatever its size."""
STAGES = ("select", "prefill", "step")


@dataclass(frozen=True)
class PrefillRow:
    """One number of vision tokens."""

    tokens: int
    ms: dict[str, Timing]
    """By stage; "plain prefill" is the twin's."""
    floor: dict[str, dict[str, Any]]
    peak_mib: float | None


@dataclass(frozen=True)
class PrefillBench:
    model: str
    shape: dict[str, Any]
    rows: list[PrefillRow]
    limits: dict[str, Any]

    @property
    def exponents(self) -> dict[str, float]:
        """Slope of log(ms) over log(tokens), by least squares over all rows."""
        tokens = [row.tokens for row in self.rows]
        return {stage: exponent(tokens, [row.ms[stage].median for row in self.rows]) for stage in self.rows[0].ms}

    def report(self) -> dict[str, Any]:
        rows = [
            {
                "tokens": r.tokens,
                **{f"{k}": t.report() for k, t in r.ms.items()},
                "floor": r.floor,
                "peak_mib": r.peak_mib,
            }
            for r in self.rows
        ]
        fitted = self.exponents if len(self.rows) > 1 else None
        return {"model": self.model, **self.shape, "limits": self.limits, "exponents": fitted, "rows": rows}

    def figure(self) -> str | None:
        """Milliseconds over tokens, with the fitted exponents in the legend, as SVG."""
        if len(self.rows) < 2:
            return None
        tokens = [row.tokens for row in self.rows]
        series = {f"{s} ~ N^{self.exponents[s]:.2f}": [row.ms[s].median for row in self.rows] for s in STAGES}
        return loglog_chart(tokens, series, "vision tokens N", "ms")

    def lines(self) -> list[str]:
        stages = list(self.rows[0].ms)
        head = ("tokens", *(f"{stage} ms" for stage in stages), "prefill x floor", "step x floor", "peak MiB")
        body = [
            (
                str(row.tokens),
                *(f"{row.ms[stage].median:.2f}" for stage in stages),
                *(f"{row.floor[stage]['times_floor']:.2f}" for stage in ("prefill", "step")),
                "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            )
            for row in self.rows
        ]
        if len(self.rows) > 1:
            body.append(("exponent", *(f"{value:.2f}" for value in self.exponents.values()), "", "", ""))
        return [table_title(self.model, self.shape), *aligned([head, *body])]


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of a straight line through (log x, log y)."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    moved = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True))
    return moved / sum((x - mean_x) ** 2 for x in log_x)


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
) -> PrefillBench:
    if len(batch) > 1:
        raise UserError("bench prefill takes one batch size: give --batch once")
    return bench(model, load_model(model, device, attention), prompt, answer, batch[0], selector, repeats)


@torch.inference_mode()
def bench(
    name: str, model: "Lavida", tokens: Sequence[int], n_answer: int, batch: int, selector: str, repeats: int
) -> PrefillBench:
    floor, cost = Floor.of(model.device, model.dtype), cost_of(model.config.lm, model.dtype)
    rows = []
    for n in tokens:
        reset_peak_memory(model.device)
        ms = {"select": select_ms(model, selector, n, batch, repeats), **lm_ms(model, n, n_answer, batch, repeats)}
        work: dict[str, Work] = {"prefill": cost.prefill(n, batch), "step": cost.step(n, n_answer, n_answer, batch)}
        floors = {stage: floor.row(ms[stage].median, work[stage]) for stage in work}
        rows.append(PrefillRow(n, ms, floors, peak_memory_mib(model.device)))
    shape = {"batch": batch, "answer": n_answer, "selector": selector, "threads": torch.get_num_threads()}
    shape["dtype"] = str(model.dtype).removeprefix("torch.")
    return PrefillBench(name, shape, rows, floor.limits.report())


def lm_ms(model: "Lavida", n: int, n_answer: int, batch: int, repeats: int) -> dict[str, Timing]:
    """Prefill and one step over a prompt of `n` tokens, and the plain twin's prefill."""
    from lavida_adapter.engine import DecodeSteps

    lm, embeds = model.lm, prompt_embeds(model, batch, n)
    steps = DecodeSteps(lm, lm.prefill(embeds, n_answer=n_answer), n_answer)
    ids = torch.full((batch, n_answer), lm.config.mask_token_id, device=embeds.device)
    angles = reference.angles_of(lm, n)
    return {
        "prefill": time_call(lambda: lm.prefill(embeds, n_answer=n_answer), embeds.device, repeats=repeats, warm_up=1),
        "plain prefill": time_call(
            lambda: reference.plain_forward(lm, embeds, None, angles), embeds.device, repeats=repeats, warm_up=1
        ),
        "step": time_call(lambda: steps(ids), embeds.device, repeats=max(repeats, 5)),
    }


def select_ms(model: "Lavida", name: str, n: int, batch: int, repeats: int) -> Timing:
    """Choosing among about `n` tokens: one square view of them with its own grid."""
    from experiments import build
    from experiments.bench.common import square_features

    budget = min(KEPT, n // 2)
    cfg = config_of(f"selector={name}", f"budget={budget}")
    selector = build.build_selector(cfg, model.config.budgets).to(model.device).eval()
    features = square_features(n, batch, model.config.vision.hidden_size, model.device, model.dtype)
    return time_call(lambda: selector(features), model.device, repeats=max(repeats, 5))
