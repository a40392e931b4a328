"""`trainer=fsdp`: the frozen base in shards, what is trained on every process.

torch's FSDP2 holds the weights of each frozen linear layer in equal parts and gathers them for the moment in which the
layer computes (Zhao et al. 2023, arXiv 2304.11277). An adapter is small and is left whole: its gradients are averaged
as under DDP, and a checkpoint is the same file as there.
"""

from collections.abc import Iterator

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class ShardedBase(DDPStrategy):
    """DDP over what requires a gradient, FSDP2 under it.

    Raises:
        ValueError: when nothing is frozen: a model that is trained whole is not this strategy's case.
    """

    def __init__(self) -> None:
        # Parameters need not be sent to begin with: every process has read the same base and drawn the same adapter.
        super().__init__(init_sync=False)

    def configure_ddp(self) -> None:
        assert self.model is not None
        layers = list(frozen_linears(self.model))
        if not layers:
            raise ValueError("trainer=fsdp shards frozen layers and this stage has none: use trainer=ddp")
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
