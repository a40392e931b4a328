"""Stages, steps and whole answers of LaViDa at true size: parts of `experiments.bench.true_size`.

Systems and engines are compared in turns. The work of each stage (`experiments.profiling.Work`) stands beside its time,
so that `experiments.bench.roofline` can divide by the limits of the device.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from baselines import Full, Pooled, Saint, TopV
from experiments.bench import reference
from experiments.bench.recorder import Bench, peak_since_mib, start_peak, synchronise, take_turns, time_ms
from experiments.profiling import LmCost, Work, cost_of, release
from lavida_adapter import DecodeConfig, LavidaConfig, LmEmbed, Prefix
from lavida_adapter.captured_steps import GraphCache
from lavida_adapter.engine import DecodeEngine, EagerEngine
from lavida_adapter.timing import StageTimer
from shirg import Selector, ShirgSelector

SYSTEMS: dict[str, Callable[[Mapping[str, int]], Selector]] = {
    "B0": lambda budgets: Pooled(),
    "P1": lambda budgets: ShirgSelector(budget=budgets["base"]),
    "P1 matched": lambda budgets: ShirgSelector(budget="matched"),
    "S1": lambda budgets: Saint(budget=budgets["wide"]),
    "S2": lambda budgets: TopV(budget=budgets["wide"]),
    "B1": lambda budgets: Full(),
}
"""The systems of conf/experiment; "P1 matched" keeps as many tokens as B0 has, newlines included."""
ENGINES: dict[str, Callable[[Any], DecodeEngine]] = {
    "eager": EagerEngine,
    "graph": GraphCache,
    "compile": partial(GraphCache, compiled=True),
}
STEPS_IN_A_ROW = 20


@dataclass
class Answering:
    """One system that answers a batch; a call is one batch from pixels to text."""

    bench: Bench
    selector: Selector
    engine: str
    batch: int
    about: dict[str, Any] = field(default_factory=dict)
    """Filled by the calls: peak memory, and of the first turn tokens, work of each stage and a digest of the answers.
    The same of each counted turn is in `turns`, since pictures may differ."""
    relevance: LmEmbed = field(default_factory=LmEmbed)
    """One for all calls and systems of a model, as in an evaluation: it keeps the mean word embedding."""
    turn: int = 0
    counts_first: bool = False
    """Whether the first turn counts, too."""

    def __call__(self) -> dict[str, float]:
        model, bench = self.bench.model, self.bench
        timer, relevance = StageTimer(bench.device), self.relevance if self.selector.uses_relevance else None
        decode = DecodeConfig(max_new_tokens=bench.n_answer, step_per_block=bench.n_steps, engine=self.engine)  # type: ignore[arg-type]  # DecodeConfig refuses unknown engines
        views = [bench.views[(self.turn * self.batch + i) % len(bench.views)] for i in range(self.batch)]
        start_peak(bench.device)
        synchronise(bench.device)
        began = time.perf_counter()
        prefix = model.encode(views, [bench.question] * self.batch, self.selector, relevance=relevance, timer=timer)
        answer = model.generate(prefix, decode, timer=timer)
        ms = timer.collect()
        ms["wall"] = 1000 * (time.perf_counter() - began)
        ms["step"] = ms["denoise"] / answer.forwards
        # Of the first answer: later ones find an arena that has grown to the longest prompt.
        self.about.setdefault("peak_mib", peak_since_mib(bench.device))
        described = self._describe(prefix, len(views[0].pixels_V3SS), answer.ids_BA, answer.forwards)
        if self.turn or self.counts_first:
            self.about.setdefault("turns", []).append(described)
        if not self.turn:
            self.about |= described
        self.turn += 1
        return ms

    def _describe(self, prefix: Prefix, n_views: int, ids_BA: Tensor, forwards: int) -> dict[str, Any]:
        bench, p = self.bench, prefix.embeds_BPD.shape[1]
        cost = cost_of(bench.model.config.lm, bench.model.dtype)
        work = {
            "tower": tower_work(bench.model.config, n_views * self.batch, bench.model.dtype.itemsize),
            "prefill": cost.prefill(p, self.batch),
            "step": step_work(cost, p, bench.n_answer, self.batch),
        }
        return {
            "visual_tokens": prefix.n_visual[0],
            "prefix": p,
            "padded": prefix.padding is not None,
            "forwards": forwards,
            "answers": sha256(ids_BA.cpu().numpy().tobytes()).hexdigest()[:16],
            "work": {stage: [least.flops, least.bytes] for stage, least in work.items()},
        }


def tower_work(config: LavidaConfig, n_views: int, item: int) -> Work:
    """Matrix products and weights of the vision tower."""
    vision, n = config.vision, config.vision.side**2
    d, layers = vision.hidden_size, vision.num_hidden_layers - 1
    weights = layers * (4 * d * d + 2 * d * vision.intermediate_size) + 3 * vision.patch_size**2 * d
    attention = layers * 4 * n * n * d
    return Work(n_views * (2 * n * weights + attention), weights * item)


def step_work(cost: LmCost, p: int, n_answer: int, batch: int) -> Work:
    """A step with the logits of every slot of the block, as a captured graph has them."""
    return cost.step(p, n_answer, n_answer, batch)


def measure_systems(bench: Bench) -> None:
    """Every system with every engine, from views to answer ids."""
    budgets, relevance = bench.model.config.budgets, LmEmbed()
    for batch in bench.batches:
        for engine in bench.engines:
            bench.model.release_engines()
            release()
            # On a CPU an answer takes a minute, and eager code has nothing to compile: one answer warms all up. It is
            # one of P1, so that the mean word embedding is there as well.
            one_warms_all = bench.device.type == "cpu" and engine == "eager"
            runs = {
                name: Answering(
                    bench,
                    make(budgets).to(bench.device).eval(),
                    engine,
                    batch,
                    relevance=relevance,
                    counts_first=one_warms_all,
                )
                for name, make in SYSTEMS.items()
            }
            keys = {name: key_of(bench, "systems", engine, batch, name) for name in runs}
            if one_warms_all:
                bench.recorder.measure(keys["P1"], replace(runs["P1"], about={}))
            about = {name: run.about for name, run in runs.items()}
            take_turns(bench.recorder, keys, runs, bench.rounds_at(batch), about, warm_up=not one_warms_all)


def key_of(bench: Bench, part: str, engine: str, batch: int, name: str) -> dict[str, Any]:
    return {"part": part, "lm": bench.lm, "engine": engine, "batch": batch, "name": name}


def prefix_of(bench: Bench, name: str, batch: int) -> Prefix:
    selector = SYSTEMS[name](bench.model.config.budgets).to(bench.device).eval()
    relevance = LmEmbed() if selector.uses_relevance else None
    return bench.model.encode(bench.views[:batch], [bench.question] * batch, selector, relevance=relevance)


def measure_reference(bench: Bench) -> None:
    """Whole answers of B0's prompt by the plain implementation of the public reference, and by each engine."""
    model = bench.model
    prefix = prefix_of(bench, "B0", 1)
    embeds, mask_id = prefix.embeds_BPD, model.config.lm.mask_token_id
    decode = DecodeConfig(max_new_tokens=bench.n_answer, step_per_block=bench.n_steps)
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: reference.plain_generate(model.lm, embeds, decode, mask_id)
    }
    for engine in bench.engines:
        own = DecodeConfig(max_new_tokens=bench.n_answer, step_per_block=bench.n_steps, engine=engine)  # type: ignore[arg-type]
        calls[engine] = lambda own=own: model.generate(prefix, own)  # type: ignore[misc]
    timed = {n: lambda call=call: {"whole": time_ms(call, bench.device)} for n, call in calls.items()}
    keys = {name: key_of(bench, "reference", name, 1, "B0") for name in calls}
    take_turns(bench.recorder, keys, timed, bench.rounds_at(1), {n: {"prefix": embeds.shape[1]} for n in calls})


def measure_steps(bench: Bench) -> None:
    """One denoising step up to the logits, engine by engine over the prompt of P1, many in a row."""
    for batch in bench.batches:
        prefix = prefix_of(bench, "P1", batch)
        steps = {engine: Stepping(bench, prefix, engine) for engine in bench.engines}
        keys = {engine: key_of(bench, "steps", engine, batch, "P1") for engine in steps}
        take_turns(bench.recorder, keys, steps, bench.rounds_at(batch), {n: one.about for n, one in steps.items()})
        agree(steps)
        for engine, one in steps.items():
            if one.ms is not None:
                bench.recorder.put(keys[engine] | {"part": "agreement"}, {"ms": {}, **one.agreement})


@dataclass
class Stepping:
    """The step of one engine over one prefix; a call times some steps in a row."""

    bench: Bench
    prefix: Prefix
    engine: str
    about: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    logits: Tensor | None = None
    ms: float | None = None

    def __call__(self) -> dict[str, float]:
        if self.logits is None:
            self._prepare()
        self.ms = time_ms(self._step, self.bench.device, STEPS_IN_A_ROW)
        return {"step": self.ms}

    def _prepare(self) -> None:
        """Prefill, the first step, and its logits."""
        bench, model, n = self.bench, self.bench.model, self.bench.n_answer
        batch, p = self.prefix.embeds_BPD.shape[:2]
        start_peak(bench.device)
        engine = ENGINES[self.engine](model.lm)
        cache = engine.prefill(
            self.prefix.embeds_BPD, self.prefix.padding, model.visual(self.prefix.visual_BP), n, None
        )
        ids_BA = torch.full((batch, n), model.config.lm.mask_token_id, device=bench.device)
        want_BM = torch.arange(n, device=bench.device).expand(batch, -1).contiguous()
        run = engine.steps(cache, n)
        self._step = lambda: run(ids_BA, want_BM)
        began = time.perf_counter()
        self.logits = self._step().clone()
        synchronise(bench.device)
        least = step_work(cost_of(model.config.lm, model.dtype), p, n, batch)
        self.about |= {
            "prefix": p,
            "first_call_s": time.perf_counter() - began,
            "peak_mib": peak_since_mib(bench.device),
            "work": {"step": [least.flops, least.bytes]},
        }


def agree(steps: Mapping[str, Stepping]) -> None:
    """How far each engine's logits are from those of the first, and how often both prefer the same token."""
    first = next(iter(steps.values())).logits
    for one in steps.values():
        if first is not None and one.logits is not None:
            a, b = first.float(), one.logits.float()
            one.agreement |= {
                "relative_error": float((a - b).norm() / a.norm()),
                "same_token": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
            }
