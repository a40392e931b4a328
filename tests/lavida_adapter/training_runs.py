"""Short training runs of the tiny model, for tests of what is trained and how."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from baselines import Pooled
from experiments.data.train_data import TrainData
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.lightning_module import LavidaModule, OptimConfig
from lavida_adapter.relevance import Relevance
from shirg import Selector
from tests.lavida_adapter.tiny import picture, tiny_model

LORA = LoraConfig(rank=2, targets=("mm_projector.{0,2}", "transformer.blocks.*.q_proj"), train_whole=("image_newline",))
OPTIM = OptimConfig(steps=6, lr=0.05, warmup=2, weight_decay=0.1)
OBJECTIVE = ObjectiveConfig(extra_padding=4)
QUIET = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Be aware that when using `ckpt_path`")
"""Lightning's own warnings: a deprecated call to torch, and a reminder about callbacks that a resumed run lacks."""


def draw(step: int) -> TrainBatch:
    words = ("red", "green", "blue")
    return TrainBatch(
        images=[picture((40, 40), seed=step), picture((38, 16), seed=step)],
        questions=[f"digit {words[step % 3]}", "letter K"],
        answers=[str(step), "blue"],
        ids=[f"{step}a", f"{step}b"],
    )


def stage(
    lora: LoraConfig = LORA,
    selector: Selector | None = None,
    optim: OptimConfig = OPTIM,
    objective: ObjectiveConfig = OBJECTIVE,
    *,
    relevance: Relevance | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
    **options: Any,
) -> LavidaModule:
    """A training stage with a fresh adapter, whose A matrices are the same at every call."""
    model, selector = tiny_model().to(dtype), selector or Pooled()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, lora, selector)
    return LavidaModule(model.train(), selector, relevance, objective, optim, seed, **options)


def fit(
    module: L.LightningModule,
    steps: int,
    *,
    resume: Path | None = None,
    batches: Callable[[int], TrainBatch] = draw,
    **options: Any,
) -> list[float]:
    """Trains on the batches of the steps; returns the loss of each step."""
    losses: list[float] = []
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*options.pop("callbacks", []), _Losses(losses)],
        **({"devices": 1, "enable_checkpointing": False} | options),
    )
    trainer.fit(module, datamodule=TrainData(batches, steps), ckpt_path=resume)
    return losses


class _Losses(L.Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The numbers of what is trained, as they are now."""
    return {n: p.detach().clone() for n, p in learned(module).items()}


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int, *, gradient: bool) -> None:
    """From step `at` on the loss, or only its gradient, is NaN."""
    original, calls = Lavida.loss, iter(range(10**6))

    def loss(self: Lavida, batch: TrainBatch, *rest: Any, **more: Any) -> Tensor:
        value = original(self, batch, *rest, **more)
        if next(calls) < at:
            return value
        return value + (value - value.detach()).abs().sqrt() if gradient else value * math.nan

    monkeypatch.setattr(Lavida, "loss", loss)
