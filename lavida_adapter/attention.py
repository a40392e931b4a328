"""One attention call, three backends that must agree.

"sdpa" is torch's own choice of kernel and the default; "math" is the plain twin that every test compares with; "flash"
is the optional flash-attn package, which knows no mask and therefore serves single prompts and equal lengths only.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["sdpa", "math", "flash"]


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention [B, H, Q, D]; `mask` (bool, broadcastable to [B, H, Q, K]) is True where a key may be seen.

    Raises:
        ValueError: for "flash" with a mask, or an unknown backend.
    """
    groups = q_BHQD.shape[1] // k_BHKD.shape[1]
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask, enable_gqa=groups > 1)
    if backend == "math":
        k, v = k_BHKD.repeat_interleave(groups, 1), v_BHKD.repeat_interleave(groups, 1)
        scores = (q_BHQD @ k.transpose(-1, -2)).float() * q_BHQD.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    if backend == "flash":
        if mask is not None:
            raise ValueError("attention=flash takes no padding mask: use batch_size=1 or attention=sdpa")
        from flash_attn import flash_attn_func  # an optional extra: pip install shirg[gpu]

        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD)))
        return out.transpose(1, 2)
    raise ValueError(f"attention={backend!r}: choose sdpa, math or flash")


def key_mask(mask_BK: Tensor | None) -> Tensor | None:
    """A key-padding mask [B, K] as an attention mask [B, 1, 1, K]; None when nothing is padded (checked by the caller)."""
    return None if mask_BK is None else mask_BK[:, None, None, :]


def image_first_mask(visual_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """Prefix mask [B, 1, P, P]: picture tokens see the picture alone, text sees everything that is not padding.

    A padded row sees itself: a row that sees nothing has no softmax.
    """
    seen = torch.where(visual_BP[:, :, None], visual_BP[:, None, :], torch.ones_like(visual_BP[:, None, :]))
    itself = torch.eye(mask_BP.shape[1], dtype=torch.bool, device=mask_BP.device)
    return ((seen & mask_BP[:, None, :]) | itself)[:, None]
