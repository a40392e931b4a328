"""Processes that train together: torchrun or srun starts them, and rank 0 keeps the records."""

import atexit
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from shirg import UserError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank in the group. Every node has the same number of processes, with consecutive ranks."""

    launcher: Literal["torchrun", "srun"] | None = None
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.world // self.local_world

    def broadcast(self, value: T) -> T:
        """Rank 0's value. Collective: every rank must call it. The values of the other ranks are ignored."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def environment(self) -> "ClusterEnvironment":
        """The launcher as Lightning describes it. Without a launcher, Lightning must not look for a cluster."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

        if self.launcher == "torchrun":
            return TorchElasticEnvironment()
        if self.launcher == "srun":
            # srun leaves this out when it was not given as an option, and Lightning insists on it.
            os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(self.local_world))
            return SLURMEnvironment(auto_requeue=False)
        return LightningEnvironment()


def detect_ranks() -> Ranks:
    """The ranks in the launcher's environment variables; one process where there is no launcher.

    A batch script that SLURM runs is not a task of srun, although it carries most of its variables.
    """
    get = os.environ.get
    if get("TORCHELASTIC_RUN_ID"):
        rank, world, local_rank, local_world = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        return Ranks(launcher="torchrun", rank=rank, world=world, local_rank=local_rank, local_world=local_world)
    if get("SLURM_STEP_ID") and get("SLURM_PROCID"):
        world, nodes = int(get("SLURM_STEP_NUM_TASKS", "1")), int(get("SLURM_STEP_NUM_NODES", "1"))
        if world % nodes:
            raise UserError(
                f"srun started {world} tasks on {nodes} nodes: start as many on each, with --ntasks-per-node"
            )
        return Ranks(
            launcher="srun",
            rank=int(os.environ["SLURM_PROCID"]),
            world=world,
            local_rank=int(os.environ["SLURM_LOCALID"]),
            local_world=world // nodes,
        )
    return Ranks()


def is_requeued() -> bool:
    """Whether SLURM runs this job again after putting it back into its queue, for example because a node was lost."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def init_distributed(cfg: DictConfig) -> Ranks:
    """This process's ranks; torch's process group is ready when there are other processes.

    Raises:
        UserError: when what the launcher started is not what the config asks for.
    """
    ranks = detect_ranks()
    trainer = cfg.get("trainer")
    if trainer is None or trainer.strategy == "single":
        if ranks.world > 1:
            raise UserError(
                f"{ranks.launcher} started {ranks.world} processes and this job runs in one: train with trainer=ddp or "
                "trainer=fsdp, or start one process"
            )
        return Ranks()
    if ranks.launcher is None:
        raise UserError(
            f"trainer={trainer.strategy} runs in processes that a launcher starts: "
            f"torchrun --nproc_per_node=2 train.py trainer={trainer.strategy} ..., or srun"
        )
    if ranks.launcher == "srun":
        _check_tasks(ranks, trainer.strategy, cfg.device)
    if ranks.nodes != trainer.num_nodes:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}, and {ranks.launcher} started processes on {ranks.nodes}: give "
            f"trainer.num_nodes={ranks.nodes}"
        )
    if not dist.is_initialized():
        # Numbers and decisions travel by the CPU's backend whatever the device is, and wait for no accelerator.
        on_cpu = cfg.device == "cpu" or not torch.cuda.is_available()
        environment = ranks.environment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world)
        atexit.register(_leave)
        # A process that stops in order would wait for the others, which are stopped as well.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return ranks


def _check_tasks(ranks: Ranks, strategy: str, device: str) -> None:
    """Refuses tasks of srun that would leave GPUs of the node idle, or train in one process.

    torchrun is not checked: its number of processes is always given by hand, and 1 is a legal choice.
    """
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    how = "with hydra/launcher=slurm give hydra.launcher.gpus_per_node=N, with srun give --ntasks-per-node=N"
    if gpus > ranks.local_world:
        raise UserError(
            f"trainer={strategy}: srun started {ranks.local_world} tasks on a node with {gpus} GPUs, a task trains on "
            f"one GPU; {how} (N={gpus})"
        )
    if ranks.world == 1:
        raise UserError(
            f"trainer={strategy} needs several processes, and srun started one task; {how}, or use trainer=default"
        )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
