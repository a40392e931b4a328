"""Prefix caches in fewer bits: packed once after the prefill, unpacked layer by layer at every step.

docs/method.md, "Packed caches". Only the memory between two steps becomes smaller: a step unpacks one layer into a
buffer of the model's dtype and reads that. An answer does not depend on the other prompts of its batch.
"""

import math

import torch
from torch import Tensor

from lavida_adapter.cache_compression.compressor import CachePacker, Packed
from shirg import UserError

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Cast(CachePacker):
    """Keys and values in a 16-bit dtype: half the memory of float32, no gain for a model that has this dtype."""

    def __init__(self, *, dtype: str = "bfloat16") -> None:
        if dtype not in ("bfloat16", "float16"):
            raise UserError(f"dtype={dtype!r}: choose bfloat16 or float16")
        self.dtype: torch.dtype = getattr(torch, dtype)

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        return (x_BHPD.to(self.dtype, copy=True),)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return packed[0].to(dtype)


class Int8(CachePacker):
    """Eight bits a number, with a minimum and a scale in float16 for every `group` numbers of a token."""

    def __init__(self, *, group: int = 64) -> None:
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise UserError(f"group={group!r}: give how many numbers share a scale, 1 or more")
        self.group = group

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        b, h, p, d = x_BHPD.shape
        x_BPC = x_BHPD.transpose(1, 2).reshape(b, p, h * d).float()
        groups = math.ceil(h * d / self.group)
        # The last group is padded with its own last number, which changes neither its range nor its scale.
        filled = torch.cat([x_BPC, x_BPC[..., -1:].expand(-1, -1, groups * self.group - h * d)], dim=-1)
        grouped = filled.unflatten(-1, (groups, self.group))
        low = grouped.amin(-1, keepdim=True).half()
        scale = ((grouped.amax(-1, keepdim=True) - low.float()) / 255).half()
        levels = (grouped - low.float()) / scale.float().clamp_min(torch.finfo(torch.half).tiny)
        codes = levels.round().clamp(0, 255).to(torch.uint8).flatten(-2)[..., : h * d]
        return codes.unflatten(-1, (h, d)).contiguous(), low, scale

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        codes, low, scale = packed
        b, p, h, d = codes.shape
        low_BPC, scale_BPC = (t.float().expand(-1, -1, -1, self.group).flatten(-2)[..., : h * d] for t in (low, scale))
        x_BPC = codes.flatten(-2).float() * scale_BPC + low_BPC
        return x_BPC.unflatten(-1, (h, d)).transpose(1, 2).to(dtype)


class Fp8(CachePacker):
    """Float8 (e4m3) with one float32 scale for every head of a prompt."""

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        x = x_BHPD.float()
        if mask_BP is not None:
            x = x.masked_fill(~mask_BP[:, None, :, None], 0.0)
        scale = x.abs().amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / FP8_MAX
        return (x / scale).to(torch.float8_e4m3fn), scale

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return (packed[0].float() * packed[1]).to(dtype)
