"""From picture to answer: samples per second by batch size, time by stage, and whether answers stay the same."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from experiments import build
from experiments.bench.common import BenchResult, Columns, table_of
from experiments.data.sample import Sample
from experiments.inference import EvalPipeline
from experiments.metrics.answers import text_metrics
from experiments.profiling import peak_memory_mib, reset_peak_memory, summarise_stages

STAGES = ("views", "tower", "relevance", "select", "project", "prefill", "denoise")
COLUMNS: Columns = {
    "": ("system", ""),
    "batch": ("batch", "d"),
    "samples/s": ("samples_per_s", ".1f"),
    "x first": ("times_first_batch", ".2f"),
    "same answers": ("same_answers", "d"),
    "tokens": ("visual_tokens", ".0f"),
    **{f"{stage} ms": (f"ms.{stage}", ".2f") for stage in STAGES},
    "peak MiB": ("peak_mib", ".0f"),
}


def run(
    *, device: torch.device, model: str, batch: list[int], only: list[str] | None, samples: int, repeats: int
) -> BenchResult:
    """`only`: selectors, or systems of conf/experiment, whose names begin with a capital letter.

    All batch sizes of a system are measured in turn, `repeats` times, so that a machine that becomes slower does so for
    all of them.
    """
    rows = []
    loaded = None
    for name in only or ["pooled", "full", "shirg"]:
        kind = "experiment" if name[0].isupper() else "selector"
        cfg = build.compose_eval(f"model={model}", f"{kind}={name}")
        loaded = loaded or build.build_model(cfg, device)
        pipeline, questions = _prepare(cfg, loaded, samples)
        passes = [[_answer(pipeline, questions, size) for size in batch] for _ in range(repeats)]
        middle = [_median_pass(of_size) for of_size in zip(*passes, strict=True)]
        rows += [
            {"system": name, "batch": size} | _row(one, middle[0]) for size, one in zip(batch, middle, strict=True)
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


def _answer(pipeline: EvalPipeline, samples: Sequence[Sample], size: int) -> dict[str, Any]:
    """One pass over all samples, after one batch that is not counted."""
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    pipeline.answer(batches[0])
    reset_peak_memory(pipeline.model.device)
    began = time.perf_counter()
    answered = [pipeline.answer(batch) for batch in batches]
    seconds = time.perf_counter() - began
    sizes = [len(batch) for batch in batches]
    shares = {k: np.asarray([a.ms[k] for a in answered]) / sizes for k in answered[0].ms}
    rows = [row for answers in answered for row in answers.rows]
    return {
        "seconds": seconds,
        "answers": [row["prediction"] for row in rows],
        "visual_tokens": sum(row["n_visual"] for row in rows) / len(rows),
        "ms": summarise_stages(shares)["ms_per_sample"],
        "peak_mib": peak_memory_mib(pipeline.model.device),
    }


def _median_pass(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pass of median duration (the lower one of two), with the durations of all."""
    seconds = [one["seconds"] for one in passes]
    middle = seconds.index(statistics.median_low(seconds))
    return passes[middle] | {"seconds_all": seconds}


def _row(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """A pass as a row of the report; `first` is the system's pass at its first batch size."""
    answers, seconds = found["answers"], found["seconds"]
    return {
        "samples_per_s": len(answers) / seconds,
        "times_first_batch": first["seconds"] / seconds,
        "seconds_all": found["seconds_all"],
        "same_answers": sum(a == b for a, b in zip(answers, first["answers"], strict=True)),
        "visual_tokens": found["visual_tokens"],
        "ms": found["ms"],
        "peak_mib": found["peak_mib"],
    }
