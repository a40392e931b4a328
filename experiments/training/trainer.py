"""Lightning's trainer as a run needs it: strategy, checkpoints, curves, progress."""

import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig

from experiments.mirror import RunLogger
from experiments.processes import Ranks
from experiments.training.checkpoints import SafeCheckpoints
from experiments.training.history import METRICS, History
from experiments.training.pace import Throughput
from experiments.training.sharded import ShardedBase


def build_trainer(
    cfg: DictConfig, crew: Ranks, device: torch.device, folder: Path, checkpoints: Path, mirror: RunLogger | None = None
) -> tuple[L.Trainer, Throughput]:
    """A trainer whose curve lies in `folder`, and its rates; the launcher has started all processes already."""
    if cfg.trainer.checkpoint_every < 1:
        raise ValueError(f"trainer.checkpoint_every={cfg.trainer.checkpoint_every}: give at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(utilities\._pytree|trainer\.connectors)")
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.callbacks\.model_checkpoint")  # a resumed folder
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # one may well train without it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    pace = Throughput(folder.name, cfg.trainer.log_every, cfg.batch_size)
    callbacks: list[Callback] = [
        PlainTermination(signal.SIG_DFL if mirror is None else mirror.sigterm),
        pace,  # before the history, which asks it
        History(folder / METRICS, cfg.trainer.log_every, mirror, pace),
        ModelCheckpoint(
            checkpoints,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=cfg.trainer.checkpoint_every,
            enable_version_counter=False,
        ),
    ]
    trainer = L.Trainer(
        accelerator=device.type,
        devices=crew.local_world if crew.world > 1 or device.type == "cpu" else [device.index or 0],
        num_nodes=crew.nodes,
        strategy=strategy(cfg.trainer.strategy),
        plugins=[crew.environment(), SafeCheckpoints()],
        precision=cfg.trainer.precision,
        max_steps=cfg.optim.steps,
        gradient_clip_val=cfg.trainer.clip,
        logger=False,  # the history tells it what it writes down
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer, pace


def strategy(name: str) -> Strategy | str:
    if name == "single":
        return "auto"
    return DDPStrategy() if name == "ddp" else ShardedBase()


class PlainTermination(Callback):
    """SIGTERM means what it meant before. Lightning's handler would message the other processes in mid-step."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.handler)
