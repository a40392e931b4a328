"""The prefix cache: keys and values of the prompt, computed once and never written again.

Keys are stored rotated, beside the positions they were rotated to, so that a denoising step neither rotates them again
nor has to guess where its own tokens start (docs/lavida.md, "Prefix cache").
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of B prefixes of P slots, for each of L layers."""

    keys: tuple[Tensor, ...]
    """L tensors [B, H, P, Dh], rotated."""
    values: tuple[Tensor, ...]
    """L tensors [B, H, P, Dh]."""
    mask_BP: Tensor | None
    """bool: False in padding slots; None when there are none."""
    positions_BP: Tensor
    """int64: the position each key was rotated to."""
    next_position_B: Tensor
    """int64: the position of the first answer token."""

    def take(self, slot_BK: Tensor, mask_BK: Tensor | None) -> "PrefixCache":
        """A cache of the given slots alone; keys stay at the positions that they were rotated to."""
        index_BHKD = slot_BK[:, None, :, None].expand(-1, self.keys[0].shape[1], -1, self.keys[0].shape[3])
        return PrefixCache(
            tuple(k.gather(2, index_BHKD) for k in self.keys),
            tuple(v.gather(2, index_BHKD) for v in self.values),
            mask_BK,
            self.positions_BP.gather(1, slot_BK),
            self.next_position_B,
        )

    def repeat(self, n: int) -> "PrefixCache":
        """The cache of the batch repeated n times: one prefix for several answers to it."""
        return PrefixCache(
            tuple(k.repeat(n, 1, 1, 1) for k in self.keys),
            tuple(v.repeat(n, 1, 1, 1) for v in self.values),
            None if self.mask_BP is None else self.mask_BP.repeat(n, 1),
            self.positions_BP.repeat(n, 1),
            self.next_position_B.repeat(n),
        )

    def digest(self) -> str:
        """SHA-256 of all keys and values; equal before and after decoding, which the tests check."""
        sha = hashlib.sha256()
        for tensor in (*self.keys, *self.values):
            sha.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return sha.hexdigest()

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))
