"""From pixels to picture tokens at true size, without the language model: a part of `experiments.bench.true_size`.

What choosing costs is the time of relevance and selection beside that of the tower, which every system runs. A head of
relevance=learned has the size that the published model's would have; its numbers are random.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from baselines import Pooled
from experiments.bench.recorder import Bench, synchronise, take_turns
from experiments.bench.stage_times import key_of
from lavida_adapter import LmEmbed
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.relevance import Relevance
from lavida_adapter.timing import StageTimer
from shirg import Selector, ShirgSelector

HEAD = {"hidden": 64}
"""Of a learned relevance at LaViDa's width: 4,792,449 parameters."""
WEIGHTS = {"similarity": 1.0, "neighbour": 0.0, "crop": 0.0}
"""Of conf/selector/shirg_learned.yaml."""


@dataclass
class EncodingTurn:
    """One system that encodes a batch; a call is one batch."""

    bench: Bench
    selector: Selector
    relevance: Relevance | None
    batch: int
    about: dict[str, Any] = field(default_factory=dict)
    turn: int = 0

    @torch.inference_mode()
    def __call__(self) -> dict[str, float]:
        bench, timer = self.bench, StageTimer(self.bench.device)
        views = [bench.views[(self.turn * self.batch + i) % len(bench.views)] for i in range(self.batch)]
        synchronise(bench.device)
        began = time.perf_counter()
        questions = [bench.question] * self.batch
        prefix = bench.model.encode(views, questions, self.selector, relevance=self.relevance, timer=timer)
        ms = timer.collect()
        ms["wall"] = 1000 * (time.perf_counter() - began)
        self.about.setdefault("visual_tokens", prefix.n_visual[0])
        self.turn += 1
        return ms


def measure_encoding(bench: Bench) -> None:
    """B0, P1 and P2 in turns."""
    base, learned = bench.model.config.budgets["base"], Learned(base=LmEmbed())
    head = learned.fresh(bench.model, HEAD)
    with torch.no_grad():
        for p in (head.last.weight, head.match_DW):  # they start at zero, which a multiplication may use
            p.normal_(std=0.1)
    head.eval().requires_grad_(False)
    systems: dict[str, tuple[Selector, Relevance | None]] = {
        "B0": (Pooled(), None),
        "P1": (ShirgSelector(budget=base), LmEmbed()),
        "P2": (ShirgSelector(budget=base, weights=WEIGHTS), learned),
    }
    for batch in bench.batches:
        runs: dict[str, Callable[[], dict[str, float]]] = {}
        about: dict[str, dict[str, Any]] = {}
        for name, (selector, relevance) in systems.items():
            turn = EncodingTurn(bench, selector.to(bench.device).eval(), relevance, batch)
            runs[name], about[name] = turn, turn.about
        keys = {name: key_of(bench, "encoding", "eager", batch, name) for name in runs}
        take_turns(bench.recorder, keys, runs, bench.rounds_at(batch), about)
