"""Training with Lightning: what every stage shares, and LaViDa's own objective."""

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lavida_adapter.model import Lavida, TrainBatch
from lavida_adapter.objective import ObjectiveConfig
from lavida_adapter.relevance import Relevance
from shirg import Selector


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine down to a floor."""

    steps: int
    lr: float
    warmup: int = 0
    lr_floor: float = 0.1
    """The last learning rate as a share of the highest."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0 or not 0 <= self.warmup <= self.steps or not 0 <= self.lr_floor <= 1:
            raise ValueError(
                "training needs steps >= 1, lr > 0, 0 <= warmup <= steps and 0 <= lr_floor <= 1, got "
                f"steps={self.steps}, lr={self.lr}, warmup={self.warmup}, lr_floor={self.lr_floor}"
            )

    def scale(self, step: int) -> float:
        """The learning rate of a step as a share of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))


class Trainable(L.LightningModule):
    """A training stage: subclasses say what the loss of a batch is. Only what needs a gradient is trained or stored."""

    def __init__(self, model: Lavida, optim: OptimConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.seed = seed
        # Checkpoints hold what is trained and nothing else: the base is a file of its own.
        self.strict_loading = False

    def loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what the loss of a batch is")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # One generator per step and rank: a run that is stopped and resumed draws what the undisturbed run drew.
        seed = self.seed * 1_000_003 + self.global_step + (self.global_rank << 40)
        generator = torch.Generator(self.device).manual_seed(seed)
        loss = self.loss(batch, generator)
        self.log("loss", loss, prog_bar=True, batch_size=1)
        self.log("lr", self.optim.lr * self.optim.scale(self.global_step), batch_size=1)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("nothing requires a gradient: there is nothing to train")
        optimizer = torch.optim.AdamW(
            trained, lr=self.optim.lr, betas=self.optim.betas, weight_decay=self.optim.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


class LavidaModule(Trainable):
    """LaViDa's masked-diffusion objective with a selector in the middle."""

    def __init__(
        self,
        model: Lavida,
        selector: Selector,
        relevance: Relevance | None,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        seed: int,
    ) -> None:
        super().__init__(model, optim, seed)
        self.selector = selector
        self.relevance = relevance
        self.objective = objective

    def loss(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        return self.model.loss(batch, self.selector, self.objective, generator, relevance=self.relevance)
