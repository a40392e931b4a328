"""Training in Lightning: optimiser and schedule, the module that trains an adapter, checkpoints of what is trained.

One run may train with several selectors, so that an adapter serves several budgets or resolutions (docs/method.md,
"Recipes").
"""

import math
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lavida_adapter.lora import check_parts, part_of
from lavida_adapter.lora_growth import RankGrowth
from lavida_adapter.loss import TrainBatch
from lavida_adapter.model import Lavida
from lavida_adapter.objective import ObjectiveConfig, Shard, Tally
from lavida_adapter.relevance import Relevance
from shirg import Selector, UserError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, with a learning rate that warms up linearly and falls along a cosine to a floor."""

    steps: int
    lr: float
    warmup: int = 0
    lr_floor: float = 0.1
    """The last learning rate as a fraction of the highest."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Highest learning rates of single parts of the model or of the selector. All other parts have `lr`."""

    def __post_init__(self) -> None:
        check_parts("optim.rates", list(self.rates))
        if wrong := {part: rate for part, rate in self.rates.items() if not 0 < rate < math.inf}:
            raise UserError(f"optim.rates={wrong}: give rates above 0, and none for a part that is not trained")
        if self.steps < 1 or not self.lr > 0 or not 0 <= self.warmup <= self.steps or not 0 <= self.lr_floor <= 1:
            raise UserError(
                "training needs steps >= 1, lr > 0, 0 <= warmup <= steps and 0 <= lr_floor <= 1, got "
                f"steps={self.steps}, lr={self.lr}, warmup={self.warmup}, lr_floor={self.lr_floor}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={str(list(self.betas)):.80}: give two numbers in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optim.weight_decay={self.weight_decay}: give a number >= 0")

    def scale(self, step: int) -> float:
        """The learning rate of a step as a fraction of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))


def _folded(seed: int) -> int:
    """A seed that torch can hold, which is the given one unless that is too large."""
    return seed % 2**63


class Trainable(L.LightningModule):
    """A training stage. A subclass defines the loss of a batch; parameters that require a gradient are trained.

    Checkpoints hold those parameters alone: the base model has files of its own.
    """

    def __init__(self, model: Lavida, optim: OptimConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.seed = seed
        self.tally: Tally | None = None
        self._ids: tuple[str, ...] = ()
        self._loss = torch.zeros(())
        self.strict_loading = False  # a checkpoint lacks the frozen parameters

    def loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what the loss of a batch is")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # One generator per step, the same on every rank: a run that is stopped and resumed, with as many processes or
        # another number, draws what the undisturbed run drew. Dropout uses the global state, seeded for each rank.
        self._ids = tuple(getattr(batch, "ids", ()))
        seed = self.seed * 1_000_003 + self.global_step
        torch.manual_seed(_folded(seed + (self.global_rank << 40)))
        loss = self.loss(batch, torch.Generator(self.device).manual_seed(_folded(seed)))
        self._loss = loss.detach()
        self.log("loss", loss, batch_size=1, sync_dist=True)
        if self.tally is not None and self.tally.right is not None:
            self.log("accuracy", self.tally.right / self.tally.masked, batch_size=1, sync_dist=True)
        scale = self.optim.scale(self.global_step)
        self.log("lr", self.optim.lr * scale, batch_size=1)
        for part, rate in self.optim.rates.items():
            self.log(f"lr_{part}", rate * scale, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stops all processes before the optimiser uses a loss or a gradient that is NaN or infinite."""
        found = {"loss": self._loss}
        if self.trainer.precision != "16-mixed":  # where overflows are normal: the loss scale is lowered
            found["gradient"] = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.log("grad_norm", found["gradient"], batch_size=1)
        # One transfer from the device for both.
        finite = torch.stack([value.float() for value in found.values()]).isfinite().tolist()
        bad = [what for what, good in zip(found, finite, strict=True) if not good]
        if self.trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            what = bad[0] if bad else "loss"
            is_ = f"is {found[what].item()}, with the samples {', '.join(self._ids) or '(no ids)'}"
            saver = self.trainer.checkpoint_callback
            saved = getattr(saver, "last_model_path", "") or "none was written yet"
            raise UserError(
                f"the {what} of step {self.global_step} {is_ if bad else 'is not finite in another process'}: stopped "
                f"before it was used; last good checkpoint: {saved}; lower optim.lr=, or look at these samples"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not trained:
            raise UserError("nothing requires a gradient: there is nothing to train")
        if idle := sorted(self.optim.rates.keys() - {part_of(name) for name in trained}):
            raise UserError(f"optim.rates.{idle[0]}: nothing of it is trained; take it out, or train it")
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            groups.setdefault(self.optim.rates.get(part_of(name), self.optim.lr), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
            betas=self.optim.betas,
            weight_decay=self.optim.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


@dataclass(frozen=True)
class SelectorSchedule:
    """Which selector each training step uses. It depends on seed and step alone, so it is the same in all processes.

    Steps go through `turns` in order, again and again; within a turn one of its selectors is drawn at random.
    """

    turns: tuple[tuple[Selector, ...], ...]

    def at(self, seed: int, step: int) -> Selector:
        turn = self.turns[step % len(self.turns)]
        return turn[random.Random(f"{seed}|mix|{step}").randrange(len(turn))]


class LavidaModule(Trainable):
    """LaViDa's masked-diffusion objective with a selector in the middle.

    A base in bfloat16 computes in bfloat16, but its trained parameters are float32, because updates are small.
    """

    def __init__(
        self,
        model: Lavida,
        selector: Selector,
        relevance: Relevance | None,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        seed: int,
        *,
        mix: SelectorSchedule | None = None,
        growth: RankGrowth | None = None,
    ) -> None:
        """`mix` gives the selector of each step; without it, all steps train with `selector`."""
        super().__init__(model, optim, seed)
        if model.dtype == torch.float16:
            raise UserError("dtype=float16 loses small gradients in training: choose dtype=bfloat16 or float32")
        self.selector = selector
        self.relevance = relevance
        self.objective = objective
        self.mix = mix
        self.growth = growth
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which float32 parameters work with a bfloat16 base: autocast, or nothing for float32."""
        narrow = self.model.dtype == torch.bfloat16
        return torch.autocast(self.model.device.type, torch.bfloat16) if narrow else nullcontext()

    def loss(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        selector = self.selector if self.mix is None else self.mix.at(self.seed, self.global_step)
        self.tally = Tally()
        with self.precision():
            loss = self.model.loss(
                batch,
                selector,
                self.objective,
                generator,
                relevance=self.relevance,
                shard=Shard.here(),
                tally=self.tally,
            )
        for name, term in self.tally.terms.items():
            self.log(f"loss_{name}", term.detach(), batch_size=1, sync_dist=True)
        if self.growth is not None:
            if not self.growth.complete:
                # Lightning reduces in place, so it gets a copy.
                mean_loss = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
                if (mean := self.growth.observe(mean_loss)) is not None:
                    self.growth.decide(mean)
            self.log("lora_rank", float(self.growth.rank), batch_size=1)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.growth is not None:
            checkpoint["growth"] = self.growth.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.growth is not None:
            self.growth.load_state_dict(checkpoint["growth"])
