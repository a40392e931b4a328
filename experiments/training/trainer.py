"""`trainer=fsdp`: the frozen base in shards, what is trained on every process.

torch's FSDP2 holds the weights of each frozen linear layer in equal parts and gathers them for the moment in which the
layer computes (Zhao et al. 2023, arXiv 2304.11277). An adapter is small and is left whole: its gradients are averaged
as under DDP, and a checkpoint is the same file as there.
"""

import logging
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from experiments.atomic_files import replacing
from experiments.jobs.distributed import Ranks
from experiments.training.callbacks import METRICS, History, Throughput
from experiments.training.run_logger import RunLogger
from shirg import UserError


class ShardedBase(DDPStrategy):
    """DDP over what requires a gradient, FSDP2 under it.

    Raises:
        UserError: when nothing is frozen: a model that is trained whole is not this strategy's case.
    """

    def __init__(self) -> None:
        # Parameters need not be sent to begin with: every process has read the same base and drawn the same adapter.
        super().__init__(init_sync=False)

    def configure_ddp(self) -> None:
        assert self.model is not None
        layers = list(frozen_linears(self.model))
        if not layers:
            raise UserError("trainer=fsdp shards frozen layers and this stage has none: use trainer=ddp")
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        # With one root above them the layers share their streams, and gather ahead while others compute.
        whole = {p for p in self.model.parameters() if not isinstance(p, DTensor)}
        fully_shard(self.model, mesh=mesh, ignored_params=whole)
        super().configure_ddp()


def frozen_linears(module: nn.Module) -> Iterator[nn.Linear]:
    for part in module.modules():
        if isinstance(part, nn.Linear) and not any(p.requires_grad for p in part.parameters()):
            yield part


def gather_base(module: nn.Module) -> None:
    """Makes the base whole again on every process, which all must ask for."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()


class SafeCheckpoints(CheckpointIO):
    """Writes beside the last checkpoint and renames; reads tensors and plain values, no code.

    Raises:
        OSError: when a checkpoint cannot be written; the one before it stays.
        UserError: when one cannot be read.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            rest = (
                "the last one is kept: make room and give resume=true" if path.exists() else "there is none before it"
            )
            raise UserError(
                f"the checkpoint of step {checkpoint['global_step']} could not be written to {path.parent} "
                f"({_reason(error)}); {rest}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not is_zipfile(path):
            raise UserError(f"{path} is not a checkpoint: overwrite=true starts again")
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise UserError(f"{path} cannot be read ({_reason(error)}): overwrite=true starts again") from error
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The operating system's word for it, which torch wraps in its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]


def build_trainer(
    cfg: DictConfig,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    checkpoints: Path,
    mirror: RunLogger | None = None,
) -> tuple[L.Trainer, Throughput]:
    """A trainer whose curve lies in `folder`, and its rates; the launcher has started all processes already."""
    if cfg.trainer.checkpoint_every < 1:
        raise UserError(f"trainer.checkpoint_every={cfg.trainer.checkpoint_every}: give at least 1")
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
        devices=ranks.local_world if ranks.world > 1 or device.type == "cpu" else [device.index or 0],
        num_nodes=ranks.nodes,
        strategy=strategy(cfg.trainer.strategy),
        plugins=[ranks.environment(), SafeCheckpoints()],
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
