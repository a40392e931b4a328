"""Prefix caches in fewer bits: packed once after the prefill, expanded a layer at a time at every step.

docs/method.md, "Packed caches". Only what lies between two steps becomes smaller: a step expands one layer into a
buffer of the model's own type and reads that. No answer depends on its batch-mates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lavida_adapter.generate import DecodeConfig
from lavida_adapter.kv_cache import PrefixCache, StoredPrefix
from lavida_adapter.llada import AttentionHook
from lavida_adapter.prefix import Prefix
from shirg import UserError

Packed = tuple[Tensor, ...]
"""What is kept of one tensor [B, H, P, Dh]."""

FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class PackedPrefix:
    """A prefix cache as its packer keeps it."""

    keys: tuple[Packed, ...]
    values: tuple[Packed, ...]
    unpack: Callable[[Packed], Tensor]
    mask_BP: Tensor | None
    next_position_B: Tensor
    length: int

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for packed in (*self.keys, *self.values) for t in packed)

    def n_slots(self, layer: int) -> int:
        return self.length

    def mask(self, layer: int) -> Tensor | None:
        return self.mask_BP

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.unpack(self.keys[layer]), self.unpack(self.values[layer])


class CachePacker:
    """Makes a prefix cache smaller, once, after the prefill. Subclasses pack and unpack one tensor [B, H, P, Dh]."""

    def check(self, prefix: Prefix, decode: DecodeConfig) -> None:
        """Raises UserError without a cache, or with an engine that reads caches as they are."""
        name = type(self).__name__
        if not decode.prefix_cache:
            raise UserError(
                f"{name} packs the prefix cache, and with decode.prefix_cache=false there is none: choose cache=none"
            )
        if decode.engine != "eager":
            raise UserError(f"{name} is expanded at every step: choose decode.engine=eager or cache=none")

    def watch(self, prefix: Prefix) -> AttentionHook | None:
        """Who looks at the prefill's queries and keys, layer by layer; None when nobody needs to."""
        return None

    def __call__(self, cache: PrefixCache, prefix: Prefix, seen: AttentionHook | None) -> StoredPrefix:
        dtype = cache.values[0].dtype
        return PackedPrefix(
            tuple(self.pack(k, cache.mask_BP) for k in cache.keys),
            tuple(self.pack(v, cache.mask_BP) for v in cache.values),
            lambda packed: self.unpack(packed, dtype),
            cache.mask_BP,
            cache.next_position_B,
            cache.n_slots(0),
        )

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        raise NotImplementedError(f"{type(self).__name__} must override pack")

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must override unpack")


class Cast(CachePacker):
    """Keys and values in a 16-bit type: half of float32, and nothing at all of a model that already is in it."""

    def __init__(self, *, dtype: str = "bfloat16") -> None:
        if dtype not in ("bfloat16", "float16"):
            raise UserError(f"dtype={dtype!r}: choose bfloat16 or float16")
        self.dtype: torch.dtype = getattr(torch, dtype)

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        return (x_BHPD.to(self.dtype, copy=True),)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return packed[0].to(dtype)


class Int8(CachePacker):
    """Eight bits a number, and a smallest value and a scale in float16 for every `group` numbers of a token."""

    def __init__(self, *, group: int = 64) -> None:
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise UserError(f"group={group!r}: give the numbers that share a scale, 1 or more")
        self.group = group

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        b, h, p, d = x_BHPD.shape
        x_BPC = x_BHPD.transpose(1, 2).reshape(b, p, h * d).float()
        groups = math.ceil(h * d / self.group)
        # The last group is filled up with its own last number, which changes neither its range nor its scale.
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
        scale = x.abs().amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / FP8_MOST
        return (x / scale).to(torch.float8_e4m3fn), scale

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return (packed[0].float() * packed[1]).to(dtype)
