"""Memory of a training step: the activations that autograd keeps (docs/method.md, "Planning a run").

The real model runs on meta tensors, and autograd reports what it saves; so layers, LoRA, gradient checkpointing and
masks count exactly. Attention counts as in its fused kernels: queries, keys, values, output and one number per query.

Letters: B rows, C copies of all rows, P prompt positions, A answer positions, T picture tokens, M masked targets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lavida_adapter.modules import LavidaModules
from lavida_adapter.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a batch."""

    rows: int
    views: int
    """Views of a picture, and their side in pixels."""
    view_px: int
    projected: int
    """Tokens per picture that go through the projector."""
    picture: int
    """Tokens per picture that enter the language model."""
    prompt: int
    """Tokens of text before the answer."""
    answer: int
    """Targets per row: the answer, its end and the padding."""


@dataclass(frozen=True)
class Footprint:
    """Activation memory of one process, in bytes."""

    kept: int
    """Kept from the forward pass until the backward pass."""
    passing: int
    """The peak on top of `kept` in the backward pass: the gradient of all logits, and a block that runs again."""


def footprint(model: LavidaModules, shape: Shape, objective: ObjectiveConfig, dtype: torch.dtype) -> Footprint:
    """The activations of one step in `dtype`, for a model on the meta device whose trained parameters are set.

    One row has one picture. Selectors count nothing: they score without a gradient.
    """
    copies = 2 if objective.complementary else 1
    kept = kept_bytes(model, lambda: _loss(model, shape, copies, objective.prefix_mask, dtype))
    width = model.lm.config.vocab_size
    logits = shape.rows * shape.answer * width * (4 + dtype.itemsize)
    again = 0
    if model.lm.recompute:
        length = shape.picture + shape.prompt + shape.answer
        x = _empty(copies * shape.rows, length, model.lm.config.d_model, dtype=dtype)
        model.lm.recompute = False
        again = kept_bytes(model, lambda: _block(model, x.requires_grad_()))
        model.lm.recompute = True
    return Footprint(kept, logits + again)


def _loss(model: LavidaModules, shape: Shape, copies: int, prefix_mask: bool, dtype: torch.dtype) -> Tensor:
    vision, lm = model.config.vision, model.lm
    tower, b = model.model.vision_tower, shape.rows
    pixels = _empty(b * shape.views, 3, shape.view_px, shape.view_px, dtype=dtype)
    learns = any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learns):
        states, _ = tower(pixels)
    states = states.reshape(b, -1, vision.hidden_size)
    projected = model.model.mm_projector(states[:, : shape.projected])
    # Pooling may leave fewer tokens than were projected; from here on their number counts.
    block = projected[:, :1].expand(-1, shape.picture, -1) + projected.new_zeros(())
    text = _empty(b, shape.prompt + shape.answer, lm.config.d_model, dtype=dtype)
    whole = torch.cat([block, text], dim=1)
    p = shape.picture + shape.prompt
    if prefix_mask:
        cache = lm.prefill(whole[:, :p])
        embeds = whole.repeat(copies, 1, 1)
        # Answers are gathered from whole rows, as for rows of unequal length, and gathering keeps the rows.
        answer_at = torch.zeros(1, shape.answer, 1, dtype=torch.int64, device="meta")
        states = lm.decode(embeds.gather(1, answer_at.expand(len(embeds), -1, embeds.shape[-1])), cache.repeat(copies))
    else:
        states = lm(whole.repeat(copies, 1, 1))[:, p:]
    # Each copy masks what the other shows: two copies have every target once, a single copy has half of them.
    masked = states.flatten(0, 1)[: max(1, b * shape.answer * copies // 2)]
    logits = lm.logits(masked)
    labels = torch.zeros(len(logits), dtype=torch.int64, device="meta")
    return F.cross_entropy(logits.float(), labels)


def _block(model: LavidaModules, x: Tensor) -> Tensor:
    cos, sin = model.lm.angles(torch.zeros(1, x.shape[1], dtype=torch.int64, device="meta"))
    return model.lm.layers[0](x, cos, sin, None, "sdpa")[0]


def kept_bytes(module: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves while computing: each storage once, without the module's parameters."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = compute()
    # Until here the graph holds every noted tensor, so no address can be reused for another one.
    del loss
    return sum(kept.values())


class _Fused(torch.autograd.Function):
    """Saves for the backward pass what a fused attention kernel saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class FusedAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention`, which on meta tensors would allocate the full attention map."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
