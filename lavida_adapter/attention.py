"""One attention call, three backends that must agree.

"sdpa" is torch's own choice of kernel and the default; "math" is the plain twin that every test compares with; "flash"
is the optional flash-attn package, which knows no mask and therefore serves single prompts and equal lengths only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

if TYPE_CHECKING:
    from lavida_adapter.config import LladaConfig

Backend = Literal["sdpa", "math", "flash"]

AttentionHook = Callable[[Tensor, Tensor, Tensor | None], None]
"""Looks at the rotated queries, the keys and the mask of a layer; called layer by layer."""


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention [B, H, Q, D]; `mask` (bool, broadcastable to [B, H, Q, K]) is True where a key may be seen.

    Raises:
        ValueError: for "flash" with a mask, or an unknown backend.
    """
    groups = q_BHQD.shape[1] // k_BHKD.shape[1]
    if backend == "sdpa":
        grouped = {"enable_gqa": True} if groups > 1 else {}  # a branch, because a compiler knows no symbolic bool
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask, **grouped)
    if backend == "math":
        k, v = k_BHKD.repeat_interleave(groups, 1), v_BHKD.repeat_interleave(groups, 1)
        scores = (q_BHQD @ k.transpose(-1, -2)).float() * q_BHQD.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    if backend == "flash":
        if mask is not None:
            raise ValueError(
                "the flash backend knows no mask: give prompts of equal length to a model with prefix_attention=full, "
                "or use the sdpa backend"
            )
        from flash_attn import flash_attn_func  # an optional extra: pip install shirg[gpu]

        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD)))
        return out.transpose(1, 2)
    raise ValueError(f"attention backend {backend!r}: choose sdpa, math or flash")


def kernel_of(backend: Backend, device: torch.device, dtype: torch.dtype, heads: "LladaConfig") -> str:
    """The backend, and for "sdpa" the kernel that torch chooses for an answer against a prefix without padding."""
    if backend != "sdpa":
        return backend
    q, k = (torch.empty(1, heads.n_heads, n, heads.head_dim, device=device, dtype=dtype) for n in (32, 1056))
    return f"sdpa ({SDPBackend(torch._fused_sdp_choice(q, k, k)).name.lower()})"


def attention_weights(q_BHQD: Tensor, k_BHKD: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` weighs values by: [B, H, Q, K] in float32, for the few queries that somebody wants to look at."""
    k = k_BHKD.repeat_interleave(q_BHQD.shape[1] // k_BHKD.shape[1], 1)
    scores = q_BHQD.float() @ k.float().transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def attention_mask(mask_BL: Tensor | None, visual_BL: Tensor | None) -> Tensor | None:
    """What each position of a sequence may see, as a mask [B, 1, 1 or L, L]; None when that is everything.

    `mask_BL` is False in padding. With `visual_BL`, picture tokens see the picture alone, the others everything that is
    not padding; a padded position then sees itself, since a softmax over nothing has no value.
    """
    if visual_BL is None:
        return None if mask_BL is None else mask_BL[:, None, None, :]
    seen_BLL = ~visual_BL[:, :, None] | visual_BL[:, None, :]
    if mask_BL is not None:
        seen_BLL = seen_BLL & mask_BL[:, None, :]
    itself = torch.eye(visual_BL.shape[1], dtype=torch.bool, device=visual_BL.device)
    return (seen_BLL | itself)[:, None]
