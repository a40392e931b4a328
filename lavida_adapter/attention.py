"""Attention of a language model: backends, which keys are seen, and the weights where a method needs them.

Shape letters: B batch, L positions, Q queries, K keys, H heads, D head size.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg import UserError

Backend = Literal["sdpa", "math", "flash", "cpp"]
"""`cpp` is chosen by `lavida_adapter.cpu_kernels`, not by a config: its kernel where it can run, otherwise `sdpa`."""

CPP_WIDTH = 16
"""The kernel of `cpp` takes no mask, and heads of a multiple of this size."""

AttentionHook = Callable[[Tensor, Tensor, Tensor | None], None]
"""Called with the rotated queries, the keys and the mask of each layer, in the order of the layers."""


def has_avx512() -> bool:
    """Whether the kernels of `lavida_adapter.cpu_kernels` can run on this CPU."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention [B, H, Q, D]; `mask` (bool, broadcastable to [B, H, Q, K]) is True where a key may be seen.

    flash-attn takes no mask: with one, "flash" is "sdpa", and `lavida_adapter.joined_prompts.kernels_of` says so.

    Raises:
        UserError: for an unknown backend.
    """
    groups = q_BHQD.shape[1] // k_BHKD.shape[1]
    if backend == "cpp" and mask is None and q_BHQD.shape[-1] % CPP_WIDTH == 0:
        heads_BQHD: Tensor = torch.ops.shirg_cpu.attend(q_BHQD, k_BHKD, v_BHKD)
        return heads_BQHD.transpose(1, 2)
    if backend in ("sdpa", "cpp") or (backend == "flash" and mask is not None):
        if groups > 1:
            return _attend_in_groups(q_BHQD, k_BHKD, v_BHKD, mask, groups)
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask)
    if backend == "math":
        k, v = k_BHKD.repeat_interleave(groups, 1), v_BHKD.repeat_interleave(groups, 1)
        scores = (q_BHQD @ k.transpose(-1, -2)).float() * q_BHQD.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    if backend == "flash":
        from flash_attn import flash_attn_func  # an optional extra: pip install shirg[gpu]

        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD)))
        return out.transpose(1, 2)
    raise UserError(f"attention backend {backend!r}: choose sdpa, math or flash")


def _attend_in_groups(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    """The queries of all heads that share keys as rows of one head.

    Keys are then read once for all of them. With torch's own grouped heads a GPU reads them for each head, and with a
    mask it has no fast kernel at all.
    """
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    q_BGRD = q_BHQD.unflatten(1, (-1, groups)).flatten(2, 3)
    out_BGRD = F.scaled_dot_product_attention(q_BGRD, k_BGKD, v_BGKD, attn_mask=mask)
    return out_BGRD.unflatten(2, (groups, -1)).flatten(1, 2)


def attention_weights(q_BHQD: Tensor, k_BHKD: Tensor, mask: Tensor | None) -> Tensor:
    """The attention weights of `attend` [B, H, Q, K] in float32; written out, so only for a few queries."""
    k = k_BHKD.repeat_interleave(q_BHQD.shape[1] // k_BHKD.shape[1], 1)
    scores = q_BHQD.float() @ k.float().transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def attention_mask(mask_BL: Tensor | None, visual_BL: Tensor | None) -> Tensor | None:
    """Which keys each position may see, as a mask [B, 1, 1 or L, L]; None when it may see all.

    `mask_BL` is False in padding. With `visual_BL` (True at picture tokens) picture tokens see picture tokens only, and
    the others see everything that is not padding. A padded position then sees itself, because a softmax over no key is
    NaN.
    """
    if visual_BL is None:
        return None if mask_BL is None else mask_BL[:, None, None, :]
    seen_BLL = ~visual_BL[:, :, None] | visual_BL[:, None, :]
    if mask_BL is not None:
        seen_BLL = seen_BLL & mask_BL[:, None, :]
    itself = torch.eye(visual_BL.shape[1], dtype=torch.bool, device=visual_BL.device)
    return (seen_BLL | itself)[:, None]
