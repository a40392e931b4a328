"""Attention of a language model: backends, which keys are seen, and the weights where a method needs them.

Shape letters: B batch, L positions, Q queries, K keys, H heads, D head size.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from lavida_adapter.lm_config import LanguageModelConfig
from shirg import UserError

Backend = Literal["sdpa", "math", "flash"]

AttentionHook = Callable[[Tensor, Tensor, Tensor | None], None]
"""Called with the rotated queries, the keys and the mask of each layer, in the order of the layers."""


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention [B, H, Q, D]; `mask` (bool, broadcastable to [B, H, Q, K]) is True where a key may be seen.

    Raises:
        UserError: for "flash" with a mask, or an unknown backend.
    """
    groups = q_BHQD.shape[1] // k_BHKD.shape[1]
    if backend == "sdpa":
        grouped = {"enable_gqa": True} if groups > 1 else {}  # a branch: torch.compile cannot trace a symbolic bool
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask, **grouped)
    if backend == "math":
        k, v = k_BHKD.repeat_interleave(groups, 1), v_BHKD.repeat_interleave(groups, 1)
        scores = (q_BHQD @ k.transpose(-1, -2)).float() * q_BHQD.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    if backend == "flash":
        if mask is not None:
            raise UserError(
                "the flash backend takes no mask: give prompts of equal length to a model with prefix_attention=full, "
                "or use the sdpa backend"
            )
        from flash_attn import flash_attn_func  # an optional extra: pip install shirg[gpu]

        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD)))
        return out.transpose(1, 2)
    raise UserError(f"attention backend {backend!r}: choose sdpa, math or flash")


def kernel_of(backend: Backend, device: torch.device, dtype: torch.dtype, config: LanguageModelConfig) -> str:
    """The backend, and for "sdpa" the kernel that torch chooses for an answer against a prefix without padding."""
    if backend != "sdpa":
        return backend
    q = torch.empty(1, config.n_heads, 32, config.head_dim, device=device, dtype=dtype)
    k = torch.empty(1, config.n_kv_heads, 1056, config.head_dim, device=device, dtype=dtype)
    chosen = torch._fused_sdp_choice(q, k, k, enable_gqa=config.n_heads > config.n_kv_heads)
    return f"sdpa ({SDPBackend(chosen).name.lower()})"


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
