"""How long a training step takes, and where the time goes: data, forward, backward, optimiser."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback

from experiments import build
from experiments.bench.common import aligned
from experiments.data.train_data import TrainData
from experiments.jobs.distributed import Ranks
from experiments.schema import CONF, VERSION_BASE
from experiments.training.stages import build_stage
from experiments.training.trainer import build_trainer
from lavida_adapter.lightning_module import Trainable

WARM_UP = 2
PHASES = ("data", "forward", "backward", "optimiser")


class Phases(Callback):
    """Milliseconds of every step by phase; an accelerator is waited for at every border."""

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


@dataclass(frozen=True)
class TrainRow:
    """One batch size."""

    batch: int
    steps: list[dict[str, float]]
    """Milliseconds by phase."""
    tokens: int
    """Positions that the language model reads in all steps."""

    def report(self) -> dict[str, Any]:
        total_ms = sum(sum(step.values()) for step in self.steps)
        spent = {phase: sum(step[phase] for step in self.steps) for phase in PHASES}
        return {
            "batch": self.batch,
            "step_ms": statistics.median(sum(step.values()) for step in self.steps),
            "samples_per_s": 1000 * self.batch * len(self.steps) / total_ms,
            "tokens_per_s": 1000 * self.tokens / total_ms,
            "shares": {phase: ms / total_ms for phase, ms in spent.items()},
            "ms_all": self.steps,
        }


@dataclass(frozen=True)
class TrainBench:
    model: str
    workers: int
    rows: list[TrainRow]

    def report(self) -> dict[str, Any]:
        return {"model": self.model, "workers": self.workers, "train": [row.report() for row in self.rows]}

    def lines(self) -> list[str]:
        table = [("batch", "step ms", "samples/s", "tokens/s", *(f"% {phase}" for phase in PHASES))]
        for found in (row.report() for row in self.rows):
            shares = (f"{100 * found['shares'][phase]:.1f}" for phase in PHASES)
            rates = (f"{found['step_ms']:.1f}", f"{found['samples_per_s']:.1f}", f"{found['tokens_per_s']:,.0f}")
            table.append((str(found["batch"]), *rates, *shares))
        return aligned(table)


def run(*, device: torch.device, model: str, batch: Sequence[int], workers: int, repeats: int) -> TrainBench:
    return TrainBench(model, workers, [time_training(model, device, size, workers, repeats) for size in batch])


def time_training(model: str, device: torch.device, batch: int, workers: int, repeats: int) -> TrainRow:
    """Trains as train.py does, with the adapter and the objective of the model's own recipe, on glyph pictures."""
    recipe = [] if model.startswith("tiny") else ["lora=shirg_980", "objective=lavida"]
    steps = WARM_UP + repeats + 1  # workers end in the last one
    words = [f"model={model}", *recipe, f"batch_size={batch}", f"optim.steps={steps}", "optim.warmup=0"]
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name="train"):
        cfg = compose("train", [*words, f"device={device}", f"trainer.checkpoint_every={2 * steps}", "study=bench"])
    torch.manual_seed(cfg.seed)
    lavida = build.build_model(cfg, device)
    stage = build_stage(cfg, lavida, Ranks())
    lavida.train()
    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = build_trainer(cfg, Ranks(), device, Path(folder), Path(folder) / "checkpoints")
        trainer.callbacks.append(phases)  # type: ignore[attr-defined]  # Lightning sets it
        trainer.fit(stage.module, datamodule=TrainData(stage.draw, steps, workers))
    return TrainRow(batch, phases.steps[WARM_UP:-1], sum(phases.tokens[WARM_UP:-1]))
