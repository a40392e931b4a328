"""How long a training step takes, and where the time goes: data, forward, backward, optimiser."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from experiments import build
from experiments.bench.common import BenchResult, Columns, say, table_of
from experiments.data.train_data import TrainData
from experiments.jobs.distributed import Ranks
from experiments.training.stages import build_stage
from experiments.training.trainer import build_trainer
from lavida_adapter.lightning_module import Trainable

WARM_UP = 2
PHASES = ("data", "forward", "backward", "optimiser")
COLUMNS: Columns = {
    "batch": ("batch", "d"),
    "step ms": ("step_ms", ".1f"),
    "samples/s": ("samples_per_s", ".1f"),
    "tokens/s": ("tokens_per_s", ",.0f"),
    **{phase: (f"shares.{phase}", ".1%") for phase in PHASES},
}


class Phases(Callback):
    """Milliseconds of every step by phase; the accelerator is synchronised at the end of each phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self._last = 0.0

    def _lap(self, module: L.LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        now = time.perf_counter()
        taken, self._last = 1000 * (now - self._last), now
        return taken

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._lap(module)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.steps.append({"data": self._lap(module)})

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.steps[-1]["forward"] = self._lap(module)

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps[-1]["backward"] = self._lap(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.steps[-1]["optimiser"] = self._lap(module)
        tally = module.tally if isinstance(module, Trainable) else None
        self.tokens.append(0 if tally is None else tally.tokens)


def run(
    *, device: torch.device, model: str, stage: str, batch: Sequence[int], workers: int, repeats: int
) -> BenchResult:
    rows = []
    for size in batch:
        say(f"batch {size}")
        steps, tokens, dtype = time_training(model, stage, device, size, workers, repeats)
        rows.append(summarise(size, steps, tokens))
        if device.type == "cuda":
            rows[-1]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    title = f"{model}, stage {stage}, {workers} workers, {torch.get_num_threads()} threads"
    report = {"model": model, "stage": stage, "dtype": dtype, "workers": workers, "train": rows}
    return BenchResult(title, report, table_of(rows, COLUMNS))


def summarise(batch: int, steps: Sequence[Mapping[str, float]], tokens: int) -> dict[str, Any]:
    """A row of the report.

    Args:
        batch: samples of a step.
        steps: milliseconds by phase.
        tokens: positions that the language model reads in all steps; a relevance head counts none.
    """
    total_ms = sum(sum(step.values()) for step in steps)
    spent = {phase: sum(step[phase] for step in steps) for phase in PHASES}
    return {
        "batch": batch,
        "step_ms": statistics.median(sum(step.values()) for step in steps),
        "samples_per_s": 1000 * batch * len(steps) / total_ms,
        "tokens_per_s": 1000 * tokens / total_ms if tokens else None,
        "shares": {phase: ms / total_ms for phase, ms in spent.items()},
        "ms_all": list(steps),
    }


def time_training(
    model: str, stage: str, device: torch.device, batch: int, workers: int, repeats: int
) -> tuple[list[dict[str, float]], int, str]:
    """Milliseconds of each step by phase, the tokens of all steps, and the type of the base's weights.

    Trains as train.py does, on glyph pictures: an adapter with the objective of the model's own recipe, or a relevance
    head (`stage=gate`).
    """
    adapter = stage == "adapt" and not model.startswith("tiny")
    recipe = ["lora=shirg_980", "objective=lavida"] if adapter else []
    steps = WARM_UP + repeats + 1  # the last one is not counted: workers end in it
    words = [f"model={model}", f"stage={stage}", *recipe, f"batch_size={batch}", f"optim.steps={steps}"]
    words += ["optim.warmup=0", f"device={device}", f"trainer.checkpoint_every={2 * steps}", "study=bench"]
    cfg, _ = build.compose_command("train", words)
    torch.manual_seed(cfg.seed)
    lavida = build.build_model(cfg, device)
    built = build_stage(cfg, lavida, Ranks())
    lavida.train()
    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = build_trainer(cfg, Ranks(), device, Path(folder), Path(folder) / "checkpoints")
        trainer.callbacks.append(phases)  # type: ignore[attr-defined]  # Lightning sets it
        trainer.fit(built.module, datamodule=TrainData(built.draw, steps, workers))
    return phases.steps[WARM_UP:-1], sum(phases.tokens[WARM_UP:-1]), str(cfg.dtype)
