"""The Lightning trainer of a run: its callbacks, its checkpoints, and the strategy `trainer=fsdp`.

There the frozen base is split over the processes before it is read (`lavida_adapter.sharding`). The trained parameters
are few, so every process has all of them: their gradients are averaged as under DDP, and a checkpoint is the same file
as there.
"""

import logging
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig

from experiments.atomic_files import replacing
from experiments.jobs.distributed import Ranks
from experiments.torch_trace import TorchTrace
from experiments.training.callbacks import METRICS, History, SigtermHandler, Throughput, TraceSteps
from experiments.training.run_logger import RunLogger
from lavida_adapter.sharding import is_split
from shirg import UserError


def build_trainer(
    cfg: DictConfig,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    checkpoints: Path,
    run_logger: RunLogger | None = None,
    trace: TorchTrace | None = None,
) -> tuple[L.Trainer, Throughput]:
    """A trainer that writes metrics.csv to `folder`, and the callback that measures its throughput.

    `checkpoints` is the folder of its checkpoints. The launcher has started all processes already.
    """
    _silence_lightning()
    throughput = Throughput(folder.name, cfg.trainer.log_every, cfg.batch_size)
    trainer = L.Trainer(
        accelerator=device.type,
        devices=ranks.local_world if ranks.world > 1 or device.type == "cpu" else [device.index or 0],
        num_nodes=ranks.nodes,
        strategy=build_strategy(cfg.trainer.strategy),
        plugins=[ranks.environment(), SafeCheckpoints()],
        precision=cfg.trainer.precision,
        max_steps=cfg.optim.steps,
        gradient_clip_val=cfg.trainer.clip,
        detect_anomaly=cfg.trainer.detect_anomaly,
        logger=False,  # History sends its points to the run logger; see there
        callbacks=[
            SigtermHandler(),
            throughput,  # before History, which reads it
            History(folder / METRICS, cfg.trainer.log_every, run_logger, throughput),
            *([TraceSteps(trace)] if trace is not None else []),
            ModelCheckpoint(
                checkpoints,
                save_last=True,
                save_top_k=0,
                every_n_train_steps=cfg.trainer.checkpoint_every,
                enable_version_counter=False,
            ),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer, throughput


def _silence_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(utilities\._pytree|trainer\.connectors)")
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.callbacks\.model_checkpoint")  # a resumed folder
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # training without it is allowed
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # never changed in place


def build_strategy(name: str) -> Strategy | str:
    if name == "single":
        return "auto"
    return DDPStrategy() if name == "ddp" else ShardedBase()


class SafeCheckpoints(TorchCheckpointIO):
    """Checkpoints that a kill or a full disk never damages, and that load no code.

    A checkpoint is written next to the last one and renamed. Lightning's own saving collects the whole file in memory,
    writes it to the system's folder for temporary files and moves it from there: on another file system that move is a
    copy, and a kill in the middle leaves half a file in place of the checkpoint before.

    Raises:
        UserError: a checkpoint that cannot be written (the one before it stays), or cannot be read.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            before = "the last one is kept" if path.exists() else "there is none before it"
            raise UserError(
                f"the checkpoint of step {checkpoint['global_step']} could not be written to {path.parent} "
                f"({_reason(error)}); {before}: make room and give resume=true"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not is_zipfile(path):
            raise UserError(f"{path} is not a checkpoint: overwrite=true starts again")
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise UserError(f"{path} cannot be read ({_reason(error)}): overwrite=true starts again") from error
        return checkpoint


def _reason(error: BaseException) -> str:
    """The operating system's reason, which torch wraps in an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]


class ShardedBase(DDPStrategy):
    """DDP for the trained parameters of a model whose frozen weights are split over the processes.

    Raises:
        UserError: no weight is split.
    """

    def __init__(self) -> None:
        # Nothing has to be sent at the start: all processes have read the same base and drawn the same adapter.
        super().__init__(init_sync=False)

    def configure_ddp(self) -> None:
        assert self.model is not None
        if not is_split(self.model):
            raise UserError("trainer=fsdp splits the frozen layers of a base, and none is frozen here: use trainer=ddp")
        super().configure_ddp()
