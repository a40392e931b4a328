"""Processes that train together: torchrun or srun starts them, and the first of them keeps the records."""

import atexit
import os
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
    """Which of them this process is. Ranks count nodes first: every node has as many processes."""

    launcher: Literal["torchrun", "srun"] | None = None
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.world // self.local_world

    def hear(self, value: T) -> T:
        """What the first process says; every process must ask. The others' own values are ignored."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def environment(self) -> "ClusterEnvironment":
        """Lightning's view of the launcher; with none, no cluster is looked for."""
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
    """What the launcher's variables say; a crew of one where there is no launcher.

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
    """Whether SLURM put this job back into its queue, after a node was lost say, and now runs it once more."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def init_distributed(cfg: DictConfig) -> Ranks:
    """This process's place, with torch's process group ready when there are others.

    Raises:
        UserError: when what the launcher started is not what the config asks for.
    """
    crew = detect_ranks()
    trainer = cfg.get("trainer")
    if trainer is None or trainer.strategy == "single":
        if crew.world > 1:
            raise UserError(
                f"{crew.launcher} started {crew.world} processes and this job runs in one: train with trainer=ddp or "
                "trainer=fsdp, or start one process"
            )
        return Ranks()
    if crew.launcher is None:
        raise UserError(
            f"trainer={trainer.strategy} runs in processes that a launcher starts: "
            f"torchrun --nproc_per_node=2 train.py trainer={trainer.strategy} ..., or srun"
        )
    if crew.nodes != trainer.num_nodes:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}, and {crew.launcher} started processes on {crew.nodes}: give "
            f"trainer.num_nodes={crew.nodes}"
        )
    if not dist.is_initialized():
        # Numbers and decisions travel by the CPU's backend whatever the device is, and wait for no accelerator.
        on_cpu = cfg.device == "cpu" or not torch.cuda.is_available()
        environment = crew.environment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, rank=crew.rank, world_size=crew.world)
        atexit.register(_leave)
    return crew


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
