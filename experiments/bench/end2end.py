"""From picture to answer: samples per second by batch size, time by stage, and whether answers stay the same."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from experiments import build
from experiments.bench.common import BenchResult, Columns, say, table_of
from experiments.data.sample import Sample
from experiments.inference import EvalPipeline
from experiments.jobs.sample_rows import SampleRow
from experiments.measured_times import summarise_stages
from experiments.metrics.answers import text_metrics
from experiments.profiling import peak_memory_mib, reset_peak_memory

STAGES = ("views", "tower", "relevance", "select", "project", "prefill", "denoise")
COLUMNS: Columns = {
    "": ("system", ""),
    "batch": ("batch", "d"),
    "samples/s": ("samples_per_s", ".1f"),
    "x first batch": ("times_first_batch", ".2f"),
    "time / first": ("over_first", ".3f"),
    "same answers": ("same_answers", "d"),
    "tokens": ("visual_tokens", ".0f"),
    **{f"{stage} ms": (f"ms.{stage}", ".2f") for stage in STAGES},
    "peak MiB": ("peak_mib", ".0f"),
}


def run(
    *, device: torch.device, model: str, batch: list[int], only: list[str] | None, samples: int, repeats: int
) -> BenchResult:
    """`only`: selectors, or systems of conf/experiment, whose names begin with a capital letter.

    Systems take turns, batch by batch, so that a machine that becomes slower does so for all of them. "time / first" is
    the median of the batches' ratios to the first system.
    """
    systems: dict[str, tuple[EvalPipeline, list[Sample]]] = {}
    loaded = None
    for name in only or ["pooled", "full", "shirg"]:
        kind = "experiment" if name[0].isupper() else "selector"
        cfg = build.compose_eval(f"model={model}", f"{kind}={name}")
        loaded = loaded or build.build_model(cfg, device)
        systems[name] = _prepare(cfg, loaded, samples)
    passes: dict[tuple[str, int], list[_Pass]] = {(name, size): [] for name in systems for size in batch}
    for _ in range(repeats):
        for size in batch:
            say(f"batch {size}")
            for name, found in _turn(systems, size).items():
                passes[name, size].append(found)
    first = next(iter(systems))
    rows = [
        {"system": name, "batch": size}
        | _row(_median_pass(found), _median_pass(passes[name, batch[0]]))
        | {"over_first": over(found, passes[first, size]), "seconds_all": [one.seconds for one in found]}
        for (name, size), found in passes.items()
    ]
    report = {"model": model, "n": samples, "threads": torch.get_num_threads(), "rows": rows}
    title = f"{model}, {samples} samples, {torch.get_num_threads()} threads"
    return BenchResult(title, report, table_of(rows, COLUMNS))


def _prepare(cfg: DictConfig, model: Any, n: int) -> tuple[EvalPipeline, list[Sample]]:
    """The pipeline as eval builds it, and its first `n` samples."""
    dataset = build.build_dataset(cfg)
    decode = build.build_decode(cfg, dataset.max_new_tokens)
    pipeline = build.build_pipeline(cfg, model, decode, text_metrics(dataset.metric_names))
    return pipeline, [dataset[i] for i in range(min(n, len(dataset)))]


@dataclass
class _Pass:
    """One pass of a system over all samples."""

    batch_s: list[float] = field(default_factory=list)
    """Seconds of each batch."""
    ms: list[dict[str, float]] = field(default_factory=list)
    """Milliseconds per sample of each batch, by stage."""
    rows: list[SampleRow] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.batch_s)

    @property
    def predictions(self) -> list[str]:
        return [row["prediction"] for row in self.rows]


def _turn(systems: Mapping[str, tuple[EvalPipeline, Sequence[Sample]]], size: int) -> dict[str, _Pass]:
    """A pass of each system, batch by batch in turn, after one batch of each that is not counted."""
    batches = {
        name: [samples[i : i + size] for i in range(0, len(samples), size)] for name, (_, samples) in systems.items()
    }
    for name, (pipeline, _) in systems.items():
        pipeline.answer(batches[name][0])
    found = {name: _Pass() for name in systems}
    for i in range(max(map(len, batches.values()))):
        for name in systems if i % 2 == 0 else reversed(list(systems)):
            if i < len(batches[name]):
                _answer(systems[name][0], batches[name][i], found[name])
    return found


def _answer(pipeline: EvalPipeline, samples: Sequence[Sample], found: _Pass) -> None:
    """Answers a batch and adds it to the pass."""
    device = pipeline.model.device
    reset_peak_memory(device)
    began = time.perf_counter()
    answers = pipeline.answer(samples)
    found.batch_s.append(time.perf_counter() - began)
    found.ms.append({stage: ms / len(samples) for stage, ms in answers.ms.items()})
    found.rows += answers.rows
    peak = peak_memory_mib(device)
    found.peak_mib = peak if peak is None else max(peak, found.peak_mib or 0.0)


def over(ours: Sequence[_Pass], theirs: Sequence[_Pass]) -> float:
    """The median of the ratios of time, batch by batch."""
    pairs = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one.batch_s, other.batch_s, strict=False)  # another dataset may have fewer
    ]
    return statistics.median(a / b for a, b in pairs)


def _median_pass(passes: Sequence[_Pass]) -> _Pass:
    """The pass of median duration, the lower one of two."""
    seconds = [one.seconds for one in passes]
    return passes[seconds.index(statistics.median_low(seconds))]


def _row(found: _Pass, first: _Pass) -> dict[str, Any]:
    """A pass as a row of the report; `first` is the system's pass at its first batch size."""
    stages = {stage: np.asarray([ms[stage] for ms in found.ms]) for stage in found.ms[0]}
    return {
        "samples_per_s": len(found.rows) / found.seconds,
        "times_first_batch": first.seconds / found.seconds,
        "same_answers": sum(a == b for a, b in zip(found.predictions, first.predictions, strict=True)),
        "visual_tokens": sum(row["n_visual"] for row in found.rows) / len(found.rows),
        "ms": summarise_stages(stages)["ms_per_sample"],
        "peak_mib": found.peak_mib,
    }
