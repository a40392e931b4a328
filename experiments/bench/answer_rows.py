"""Memory and time of a job's rows by their number: answered, journaled, stopped, resumed, summarised and written.

The path is that of `eval.py`; only the model is left out: a stand-in makes rows as large as real ones. Each number of
samples has processes of its own, because a process's peak never falls.
"""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from experiments.bench.common import BenchResult, Columns, only_one, table_of
from experiments.data.chosen_samples import choose_samples
from experiments.data.sample import Sample
from experiments.evaluate import answer_and_summarise
from experiments.inference import Answers
from experiments.jobs.answer_journal import JOURNAL
from experiments.jobs.job import Job
from experiments.jobs.results import SAMPLES
from experiments.jobs.sample_facts import facts_of
from experiments.jobs.sample_rows import SampleRow, digests_of, read_facts
from experiments.metrics.answers import score_answer, text_metrics
from experiments.profiling import peak_mib

N_TOKENS = 3645
"""Source tokens of a picture at true size."""
PER_PICTURE = 5
FEW = 64
"""Samples of the job whose peak is the base."""
STAGES = ("views", "tower", "select", "project", "prefill", "denoise")
COLUMNS: Columns = {
    "samples": ("n", "d"),
    "peak MiB": ("whole.peak_mib", ".0f"),
    "over base": ("whole.over_base_mib", ".1f"),
    "resumed": ("resumed.peak_mib", ".0f"),
    "over base ": ("resumed.over_base_mib", ".1f"),
    "s": ("whole.seconds", ".1f"),
    "s resumed": ("resumed.seconds", ".1f"),
    "journal MiB": ("whole.journal_mib", ".0f"),
    "samples MiB": ("whole.samples_mib", ".0f"),
}


class Questions:
    """A dataset as large as one likes: a question is made when it is asked for."""

    name, split = "questions", "val"
    metric_names: tuple[str, ...] = ("anls",)
    max_new_tokens, questions_per_picture = 8, PER_PICTURE

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        question = f"What is the colour of thing number {i} on the left of the picture?"
        return Sample(
            id=f"val-{i:09d}",
            dataset=self.name,
            split=self.split,
            load_image=lambda: Image.new("RGB", (8, 8)),
            size=None,
            question=question,
            prompt=f"{question}\nAnswer in one word.",
            answers=tuple(f"answer {i * k % 7}" for k in range(10)),
            subtask=f"kind {i % 3}",
            boxes=((0.1, 0.2, 0.3, 0.4),),
            meta={"picture": f"picture-{i // PER_PICTURE:09d}", "group": ("fine", "guard")[i % 2]},
        )


@dataclass(frozen=True)
class RowMaker:
    """In place of an `EvalPipeline`: random rows of the right size instead of answers."""

    kept: int
    scorers = text_metrics(["anls", "exact_match"])
    model = SimpleNamespace(config=None)
    selector = SimpleNamespace(geometry=None)
    n_vision = 0

    def answer(self, batch: list[Sample], loaded: object) -> Answers:
        rows = [self._row(sample) for sample in batch]
        return Answers(rows, [], (), dict.fromkeys(STAGES, 1.0 * len(batch)))

    def _row(self, sample: Sample) -> SampleRow:
        number = int(sample.id.removeprefix("val-"))
        rng = np.random.default_rng(number)
        prediction = sample.answers[number % 10]
        row = {
            **facts_of(sample),
            "picture_digest": f"{number // PER_PICTURE:032x}",
            "prediction": prediction,
            "text": prediction,
            "gaps": [],
            "scores": score_answer(self.scorers, prediction, sample.answers, sample.target),
            "n_visual": self.kept,
            "n_prefix": self.kept + 30 + number % 7,
            "kept": np.sort(rng.permutation(N_TOKENS)[: self.kept]).tolist(),
            "n_steps": 1 + number % 8,
            "cache_bytes": 1e6,
            "recall": float(rng.random()),
            "n_valid": N_TOKENS,
            "coverage": int(rng.integers(200)) / 200,
            "gini": int(rng.integers(200)) / 200,
            "kept_map": (rng.integers(0, 57, 64) / 57).tolist(),
            "sources": {"kept": self.kept, "scaffold": 0},
        }
        return cast(SampleRow, row)


def run(*, device: torch.device, n: list[int], kept: list[int], batch: list[int]) -> BenchResult:
    n_kept, size = only_one("rows", "kept", kept), only_one("rows", "batch", batch)
    base = _measure(FEW, n_kept, size)["whole"]["peak_mib"]
    rows: list[dict[str, Any]] = [{"n": each, **_measure(each, n_kept, size)} for each in n]
    for row in rows:
        for part in ("whole", "resumed"):
            row[part]["over_base_mib"] = row[part]["peak_mib"] - base
    notes = [f"base: {base:.0f} MiB, the peak of a job of {FEW} samples"]
    fits = {}
    if len(n) > 1:
        fits = {key: {part: _exponent(n, rows, part, key) for part in ("whole", "resumed")} for key in _FITTED}
        notes += [f"{key} grows as samples to the power of {fit['whole']:.2f}" for key, fit in fits.items()]
    report = {"kept": n_kept, "batch": size, "base_mib": base, "rows": rows, "exponents": fits}
    return BenchResult(f"rows of {n_kept} kept tokens", report, table_of(rows, COLUMNS), tuple(notes))


_FITTED = ("over_base_mib", "seconds")


def _exponent(n: list[int], rows: list[dict[str, Any]], part: str, key: str) -> float:
    """The slope of the logarithms; less than a MiB over the base counts as one."""
    values = [max(row[part][key], 1.0 if key == "over_base_mib" else 1e-3) for row in rows]
    return float(np.polyfit(np.log(n), np.log(values), 1)[0])


def _measure(n: int, kept: int, batch: int) -> dict[str, dict[str, float]]:
    """A job in a process, and in another one the same job after it was killed while it wrote its last batch."""
    with TemporaryDirectory() as folder:
        whole = _in_process(Path(folder), n, kept, batch)
        digests = _torn(Path(folder))
        resumed = _in_process(Path(folder), n, kept, batch)
        assert digests == digests_of(read_facts(Path(folder) / SAMPLES)), "the resumed job has other rows"
    return {"whole": whole, "resumed": resumed}


def _torn(folder: Path) -> dict[str, str | None]:
    """Removes the samples and the end of the journal; returns the digests of the samples."""
    digests = digests_of(read_facts(folder / SAMPLES))
    (folder / SAMPLES).unlink()
    with open(folder / JOURNAL, "r+b") as journal:
        journal.truncate((folder / JOURNAL).stat().st_size - 1)
    return digests


def _in_process(folder: Path, n: int, kept: int, batch: int) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.bench.answer_rows", str(folder), str(n), str(kept), str(batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return cast(dict[str, float], json.loads(done.stdout.splitlines()[-1]))


def job(folder: Path, n: int, kept: int, batch: int) -> dict[str, float]:
    """One job from its samples to its summary; its journal stays."""
    began = time.perf_counter()
    samples = choose_samples(Questions(n), None, 0)
    examples = SimpleNamespace(watch=nullcontext(), draw=lambda *_: None)
    about = Job(folder, cast(Any, SimpleNamespace(job=f"{n} rows")), cast(Any, None))
    answer_and_summarise(cast(Any, RowMaker(kept)), samples, cast(Any, examples), about, "weights", batch, workers=0)
    digests_of(read_facts(folder / SAMPLES))
    return {
        "seconds": time.perf_counter() - began,
        "peak_mib": peak_mib(torch.device("cpu")),
        "journal_mib": (folder / JOURNAL).stat().st_size / 2**20,
        "samples_mib": (folder / SAMPLES).stat().st_size / 2**20,
    }


if __name__ == "__main__":
    where, *sizes = sys.argv[1:]
    print(json.dumps(job(Path(where), *map(int, sizes))))
