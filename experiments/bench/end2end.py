"""From picture to answer: samples per second by batch size, where the time goes, whether answers stay the same."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from experiments import build
from experiments.bench.common import aligned, config_of
from experiments.data.sample import Sample
from experiments.inference import EvalPipeline
from experiments.metrics.answers import text_metrics
from experiments.profiling import peak_memory_mib, reset_peak_memory, summarise_stages

STAGES = ("views", "tower", "relevance", "select", "project", "prefill", "denoise")


@dataclass(frozen=True)
class EndToEndRow:
    """One system at one batch size, over all samples."""

    system: str
    batch: int
    seconds: float
    """Median of the passes."""
    seconds_all: tuple[float, ...]
    ms: dict[str, float]
    """Median milliseconds per sample by stage."""
    answers: tuple[str, ...]
    visual_tokens: float
    peak_mib: float | None


@dataclass(frozen=True)
class EndToEndBench:
    model: str
    n: int
    rows: list[EndToEndRow]

    def first(self, row: EndToEndRow) -> EndToEndRow:
        """The same system at its first batch size."""
        return next(other for other in self.rows if other.system == row.system)

    def report(self) -> dict[str, Any]:
        rows = [
            {
                "system": row.system,
                "batch": row.batch,
                "samples_per_s": self.n / row.seconds,
                "times_first_batch": self.first(row).seconds / row.seconds,
                "seconds_all": list(row.seconds_all),
                "same_answers": sum(a == b for a, b in zip(row.answers, self.first(row).answers, strict=True)),
                "visual_tokens": row.visual_tokens,
                "ms": row.ms,
                "peak_mib": row.peak_mib,
            }
            for row in self.rows
        ]
        return {"model": self.model, "n": self.n, "threads": torch.get_num_threads(), "rows": rows}

    def lines(self) -> list[str]:
        head = ("", "batch", "samples/s", "x first", "same answers", "tokens", *(f"{s} ms" for s in STAGES), "peak MiB")
        body = []
        for row in self.report()["rows"]:
            stages = (f"{row['ms'].get(stage, 0.0):.2f}" for stage in STAGES)
            numbers = (f"{row['samples_per_s']:.1f}", f"{row['times_first_batch']:.2f}")
            same = f"{row['same_answers']}/{self.n}"
            peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            cells = (row["system"], str(row["batch"]), *numbers, same, f"{row['visual_tokens']:.0f}", *stages, peak)
            body.append(cells)
        return [f"{self.model}, {self.n} samples, {torch.get_num_threads()} threads", *aligned([head, *body])]


def run(
    *, device: torch.device, model: str, batch: list[int], only: list[str] | None, samples: int, repeats: int
) -> EndToEndBench:
    """`only`: selectors, or the notes' systems by their names in conf/experiment. All batch sizes of a system take
    turns, `repeats` times, so that a machine that becomes slower does so for all of them."""
    rows = []
    loaded: dict[str, Any] = {}
    for name in only or ["pooled", "full", "shirg"]:
        kind = "experiment" if name[0].isupper() else "selector"
        cfg = config_of(f"model={model}", f"{kind}={name}")
        system, given = prepare(cfg, device, samples, loaded)
        passes = [[answer(name, system, given, size) for size in batch] for _ in range(repeats)]
        rows += [median(of_size) for of_size in zip(*passes, strict=True)]
    return EndToEndBench(model, samples, rows)


def prepare(cfg: DictConfig, device: torch.device, n: int, loaded: dict[str, Any]) -> tuple[EvalPipeline, list[Sample]]:
    """The system as eval builds it, and its first `n` samples; the model is loaded once."""
    dataset = build.build_dataset(cfg)
    model = loaded.setdefault("model", None) or build.build_model(cfg, device)
    loaded["model"] = model
    decode = build.build_decode(cfg, dataset.max_new_tokens)
    system = build.build_pipeline(cfg, model, decode, text_metrics(dataset.metric_names))
    return system, [dataset[i] for i in range(min(n, len(dataset)))]


def median(passes: Sequence[EndToEndRow]) -> EndToEndRow:
    """The pass of median duration, with the durations of all."""
    ranked = sorted(passes, key=lambda row: row.seconds)
    return replace(ranked[(len(ranked) - 1) // 2], seconds_all=tuple(row.seconds for row in passes))


def answer(name: str, system: EvalPipeline, samples: Sequence[Sample], size: int) -> EndToEndRow:
    """Answers everything once, after one batch that is not counted."""
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    system.answer(batches[0])
    reset_peak_memory(system.model.device)
    began = time.perf_counter()
    answered = [system.answer(batch) for batch in batches]
    seconds = time.perf_counter() - began
    shares = [{k: ms / len(batch) for k, ms in a.ms.items()} for a, batch in zip(answered, batches, strict=True)]
    rows = [row for answers in answered for row in answers.rows]
    return EndToEndRow(
        name,
        size,
        seconds,
        (seconds,),
        summarise_stages(shares)["ms_per_sample"],
        tuple(row["prediction"] for row in rows),
        sum(row["n_visual"] for row in rows) / len(rows),
        peak_memory_mib(system.model.device),
    )
