"""Weights of a block stored one behind the other, so that projections of the same input are one matrix product.

A step of a few answer tokens reads every weight once, and large products come nearer to the memory's rate than small
ones. The linear layers keep their parameters, which become views of the joined storage: no weight is stored twice, and
a change in place, such as the merging of an adapter, changes both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavida_adapter.language_model import Block, LanguageModel, StepLayer, rotate


@dataclass(frozen=True)
class FusedLayer:
    """A block with joined weights; it computes what `Block` does, with four matrix products instead of seven."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float
    head_dim: int
    kv_heads: int

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values [B, H, L, Dh]."""
        heads = F.linear(self._norm(x, self.attention_norm), self.qkv, self.qkv_bias)
        heads = heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        rotated = rotate(heads[:, : -self.kv_heads], cos, sin)
        return rotated[:, : -self.kv_heads], rotated[:, -self.kv_heads :], heads[:, -self.kv_heads :]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.linear(attended, self.out)
        gate, up = F.linear(self._norm(x, self.mlp_norm), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * weight


def step_layers(lm: LanguageModel) -> Sequence[StepLayer]:
    """The blocks of a model with joined weights, or the blocks themselves where an adapter sits on a projection."""
    if not all(type(layer).forward is nn.Linear.forward for block in lm.layers for layer in _projections(block)):
        return lm.layers
    return [_fused(block) for block in lm.layers]


def storage_of(lm: LanguageModel) -> tuple[int, ...]:
    """Where the weights of the blocks lie: it changes when they are moved, replaced or adapted, not with their values.

    What was captured or joined before such a change reads weights that are no longer the model's.
    """
    return tuple(p.data_ptr() for block in lm.layers for p in block.parameters())


def _projections(block: Block) -> tuple[nn.Linear, ...]:
    return block.query, block.key, block.value, block.attention_out, block.gate, block.up, block.down


def _fused(block: Block) -> FusedLayer:
    qkv = (block.query, block.key, block.value)
    biases = [layer.bias for layer in qkv if layer.bias is not None]
    return FusedLayer(
        attention_norm=block.attention_norm.weight,
        qkv=join([layer.weight for layer in qkv]),
        qkv_bias=join(biases) if biases else None,
        out=block.attention_out.weight,
        mlp_norm=block.mlp_norm.weight,
        gate_up=join([block.gate.weight, block.up.weight]),
        down=block.down.weight,
        eps=block.attention_norm.eps,
        head_dim=block.head_dim,
        kv_heads=block.key.out_features // block.head_dim,
    )


@torch.inference_mode(False)
@torch.no_grad()
def join(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters one behind the other; they become views of the result, if they are not views of one already."""
    first = parameters[0]
    sizes = [len(p) for p in parameters]
    shape = (sum(sizes), *first.shape[1:])
    ends = [p.data_ptr() + p.numel() * p.element_size() for p in parameters]
    adjacent = all(p.data_ptr() == end for p, end in zip(parameters[1:], ends, strict=False))
    same_storage = len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    if adjacent and same_storage and all(p.is_contiguous() for p in parameters):
        return torch.as_strided(first.data, shape, first.stride())
    whole = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, whole.split(sizes), strict=True):
        p.data = part
    return whole


@torch.inference_mode(False)
@torch.no_grad()
def store_apart(module: nn.Module) -> None:
    """Gives each parameter a storage of its own, row by row, as a checkpoint is loaded; the values do not change."""
    for p in module.parameters():
        if not p.is_contiguous() or p.untyped_storage().nbytes() != p.numel() * p.element_size():
            p.data = p.data.clone(memory_format=torch.contiguous_format)
