"""A frozen base split over processes: every process holds equal parts of the weights and reads or draws only those.

torch's FSDP2 gathers the parts of one block at a time, when it computes (Zhao et al. 2023, arXiv 2304.11277). A unit
that is gathered at once is a block of the language model, a layer of the vision tower, or the head. Only frozen
weights of linear layers are split. All else stays whole in every process: what is trained, the projector, norms and
biases, and the word embedding, of which single rows are read in many places.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lavida_adapter.language_model import Block
from lavida_adapter.modules import LavidaModules
from shirg import UserError

_ENTRIES = ("encode", "generate", "loss", "enter")
"""Where a computation enters the model, as `forward` of other models."""
_PARTS = ("keys_values", "queries", "project", "output", "finish")
"""Methods of a block that are called one by one, in decoding and for the last block of a prefill."""


def units(model: LavidaModules) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """Every unit that has linear layers with frozen weights, with these layers."""
    for unit in (*model.model.vision_tower.layers, *model.lm.layers, model.lm.head):
        layers = [part for part in unit.modules() if isinstance(part, nn.Linear) and not part.weight.requires_grad]
        if layers:
            yield unit, layers


def shard(model: LavidaModules, mesh: DeviceMesh) -> None:
    """Splits the frozen weights of the model, which may be on the meta device, over the processes of a mesh.

    Raises:
        UserError: there are none.
    """
    found = list(units(model))
    if not found:
        raise UserError("trainer=fsdp splits the frozen layers of a base, and none is frozen here: use trainer=ddp")
    whole = set(model.parameters()) - {layer.weight for _, layers in found for layer in layers}
    gathered = _Gathered()
    for unit, layers in found:
        fully_shard(unit, mesh=mesh, ignored_params=whole)
        if isinstance(unit, Block):
            for name in _PARTS:
                setattr(unit, name, gathered.entry(unit, name, layers[0]))
    # Under one root the units share CUDA streams, and the next one is gathered while others compute.
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))
    for name in _ENTRIES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


class _Gathered:
    """Gathers a block for a call of one of its parts, where it is not whole already.

    With gradients FSDP's own hooks gather it, and once more in the backward pass. Without, the block stays whole until
    a part of another block is called: a denoising step calls three parts of each block.
    """

    def __init__(self) -> None:
        self._last: FSDPModule | None = None

    def entry(self, block: Block, name: str, layer: nn.Linear) -> Callable[..., Any]:
        """The method with that name, which gathers the block first; `layer` is one of its split ones."""
        plain = getattr(block, name)
        register_fsdp_forward_method(block, name)
        with_hooks = getattr(block, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(layer.weight, DTensor):
                return plain(*args, **kwargs)
            if torch.is_grad_enabled():
                return with_hooks(*args, **kwargs)
            self._gather(block)
            return plain(*args, **kwargs)

        return call

    def _gather(self, block: nn.Module) -> None:
        assert isinstance(block, FSDPModule)
        if self._last is not None and self._last is not block:
            self._last.reshard()
        with torch.inference_mode(False):  # what is gathered here may be used by a later training step
            block.unshard()
        self._last = block


def gather_base(model: nn.Module) -> None:
    """Gathers all split weights in every process. Collective: every process must call it."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()


def is_split(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of one that is not split."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def own_rows(parameter: Tensor) -> slice:
    """The rows of a parameter that this process holds: all of one that is not split."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    n, world = len(parameter), parameter.device_mesh.size()
    rows = -(-n // world)
    begin = min(n, rows * parameter.device_mesh.get_local_rank())
    return slice(begin, min(n, begin + rows))


def place(model: nn.Module, name: str, rows: Tensor) -> None:
    """Makes `rows`, the own rows of a parameter of a model on the meta device, this parameter."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    before = module.get_parameter(leaf)
    if isinstance(before, DTensor):
        mesh, placements = before.device_mesh, before.placements
        rows = DTensor.from_local(rows, mesh, placements, run_check=False, shape=before.shape, stride=before.stride())
    module.register_parameter(leaf, nn.Parameter(rows, requires_grad=before.requires_grad))


@torch.no_grad()
def draw(model: LavidaModules, device: torch.device) -> None:
    """Fresh weights for a model on the meta device: the numbers that building it on the device would draw.

    Modules draw one after the other, in the order in which they are built, and of split weights the other rows are
    dropped: no more than one module is ever whole.
    """
    for name, module in _in_order(model, ""):
        split = dict(module.named_parameters(recurse=False))
        for leaf, p in split.items():
            module.register_parameter(leaf, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)))
        module.reset_parameters()  # type: ignore[operator]
        drawn = dict(module.named_parameters(recurse=False))
        for leaf, p in split.items():
            module.register_parameter(leaf, p)
            rows = own_rows(p)
            whole = rows.stop - rows.start == len(p)
            place(model, f"{name}.{leaf}", drawn[leaf] if whole else drawn[leaf][rows].clone())
    model.model.vision_tower.number_positions(device)
    model.initialise()


def _in_order(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of their own, each behind its parts."""
    for child, part in module.named_children():
        yield from _in_order(part, f"{name}.{child}".lstrip("."))
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module


def in_all(model: nn.Module, found: Collection[str]) -> list[str]:
    """What any process has found in its parts of a split model, sorted; collective for a split model alone."""
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return sorted(found)
    all_found: list[Collection[str]] = [()] * mesh.size()
    dist.all_gather_object(all_found, found, group=mesh.get_group())
    return sorted({name for names in all_found for name in names})


def first_bits(tensors: Collection[Tensor], n: int) -> list[Tensor]:
    """Of each tensor the first `n` numbers as bfloat16, their bits as int16 on the CPU.

    Collective for split tensors: every process sends the numbers that it holds, all tensors in one message.
    """
    heads = [_own_bits(tensor, n) for tensor in tensors]
    split = {i: tensor for i, tensor in enumerate(tensors) if isinstance(tensor, DTensor)}
    if split:
        mesh = next(iter(split.values())).device_mesh
        sent = torch.cat([heads[i] for i in split]).to(mesh.device_type, torch.int32)  # int16 cannot be added
        dist.all_reduce(sent, group=mesh.get_group())
        for i, head in zip(split, sent.short().cpu().split([len(heads[i]) for i in split]), strict=True):
            heads[i] = head
    return heads


def _own_bits(tensor: Tensor, n: int) -> Tensor:
    """The bits of the first `n` numbers that this process holds; zeros for the others."""
    bits = torch.zeros(min(n, tensor.numel()), dtype=torch.int16)
    begin = min(n, own_rows(tensor).start * (tensor.numel() // len(tensor)))
    head = held(tensor).detach().reshape(-1)[: n - begin].to(torch.bfloat16).view(torch.int16).cpu()
    bits[begin : begin + len(head)] = head
    return bits
