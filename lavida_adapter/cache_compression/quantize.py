"""Prefix caches in fewer bits: packed once after the prefill, unpacked layer by layer at every step.

docs/method.md, "Packed caches". Only the memory between two steps becomes smaller: a step unpacks one layer into a
buffer of the model's dtype and reads that. An answer does not depend on the other prompts of its batch.
"""

import math

import torch
from torch import Tensor

from lavida_adapter.cache_compression.compressor import CachePacker, Packed
from lavida_adapter.prefix_attention import current
from shirg import UserError
from shirg.kernels import usable

WIDE = 1024
"""Numbers that a program of a kernel unpacks."""
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

    def unpack_into(self, packed: Packed, out_BHPD: Tensor) -> None:
        out_BHPD.copy_(packed[0])


class Quantized(CachePacker):
    """Numbers that have to be computed back; on a GPU by one kernel, straight to where attention reads them."""

    def unpack_into(self, packed: Packed, out_BHPD: Tensor) -> None:
        if usable(out_BHPD.device):
            self.unpack_by_kernel(packed, out_BHPD)
        else:
            super().unpack_into(packed, out_BHPD)

    def unpack_by_kernel(self, packed: Packed, out_BHPD: Tensor) -> None:
        """`unpack`, written to a tensor with any strides but the last."""
        raise NotImplementedError(f"{type(self).__name__} must override unpack_by_kernel")


class Int8(Quantized):
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

    def unpack_by_kernel(self, packed: Packed, out_BHPD: Tensor) -> None:
        from lavida_adapter.step_triton import unpack_int8_kernel  # Triton is optional

        codes, low, scale = packed
        b, p, h, d = codes.shape
        sizes = p, h, low.shape[2], *out_BHPD.stride()[:3]
        with current(codes.device):
            unpack_int8_kernel[(b * p, -(-h * d // WIDE))](
                codes, low, scale, out_BHPD, *sizes, WIDTH=d, GROUP=self.group, WIDE=WIDE
            )


class Fp8(Quantized):
    """Float8 (e4m3) with one float32 scale for every head of a prompt."""

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        x = x_BHPD.float()
        if mask_BP is not None:
            x = x.masked_fill(~mask_BP[:, None, :, None], 0.0)
        scale = x.abs().amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / FP8_MAX
        return (x / scale).to(torch.float8_e4m3fn).contiguous(), scale.contiguous()

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return (packed[0].float() * packed[1]).to(dtype)

    def unpack_by_kernel(self, packed: Packed, out_BHPD: Tensor) -> None:
        from lavida_adapter.step_triton import unpack_fp8_kernel  # Triton is optional

        codes, scale = packed
        b, h, p, d = codes.shape
        sizes = p, h, *out_BHPD.stride()[:3]
        with current(codes.device):
            unpack_fp8_kernel[(b * h, -(-p * d // WIDE))](
                codes.view(torch.uint8), scale, out_BHPD, *sizes, WIDTH=d, WIDE=WIDE
            )
