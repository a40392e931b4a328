"""The prefix cache: keys and values of the prompt, computed once and never written again.

Keys are stored rotated, beside the positions they were rotated to, so that a denoising step neither rotates them again
nor has to guess where its own tokens start (docs/lavida.md, "Prefix cache").
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StoredPrefix(Protocol):
    """A prefix cache of any kind, as the denoising steps read it, layer by layer. It never changes."""

    @property
    def next_position_B(self) -> Tensor: ...

    @property
    def n_bytes(self) -> int:
        """Memory of what is stored between steps."""

    def n_slots(self, layer: int) -> int: ...

    def mask(self, layer: int) -> Tensor | None:
        """bool [B, P]: False in padding slots; None when there are none."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, H, P, Dh] in the model's dtype."""


class Slots:
    """A key and a value buffer [B, H, P + A, Dh] for each layer.

    The prefix is written once, the answer behind it at every step, so that nothing is concatenated.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], n_answer: int) -> None:
        self.keys, self.values, self.n_answer = tuple(keys), tuple(values), n_answer

    @classmethod
    def blank(cls, like_BHPD: Tensor, lengths: Sequence[int], n_answer: int) -> "Slots":
        """Buffers of their own; `lengths`: prefix slots of each layer."""
        b, h, _, d = like_BHPD.shape
        keys = [like_BHPD.new_empty(b, h, n + n_answer, d) for n in lengths]
        return cls(keys, [torch.empty_like(k) for k in keys], n_answer)

    @classmethod
    def zeros(cls, n_layers: int, shape: tuple[int, ...], n_answer: int, like: Tensor) -> "Slots":
        """Buffers of one shape [B, H, P + A, Dh] that are safe to read where nothing is written."""
        keys, values = ([like.new_zeros(shape) for _ in range(n_layers)] for _ in range(2))
        return cls(keys, values, n_answer)

    def write(self, layer: int, keys_BHPD: Tensor, values_BHPD: Tensor) -> tuple[Tensor, Tensor]:
        """Copies a prefix to the first slots of a layer; returns views of it there."""
        n = keys_BHPD.shape[2]
        for whole, new in ((self.keys[layer], keys_BHPD), (self.values[layer], values_BHPD)):
            whole[:, :, :n].copy_(new)
            whole[:, :, n:].zero_()  # unused slots get an attention weight of 0, and 0 * NaN would be NaN
        return self.keys[layer][:, :, :n], self.values[layer][:, :, :n]


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
    slots: Slots | None = None
    """The buffers that keys and values are views of, when the prefill reserved slots for an answer."""
    visual_BP: Tensor | None = None
    """bool: the picture tokens, when they saw picture tokens only; None when every token saw every token."""
    last_BD: Tensor | None = None
    """The final state of each prompt's last token, of a language model that predicts the next token."""

    def n_slots(self, layer: int) -> int:
        return self.keys[layer].shape[2]

    def mask(self, layer: int) -> Tensor | None:
        return self.mask_BP

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def take(self, slot_BK: Tensor, mask_BK: Tensor | None) -> "PrefixCache":
        """A cache of the given slots; keys keep the positions that they were rotated to."""
        return PrefixCache(
            tuple(take_slots(k, slot_BK) for k in self.keys),
            tuple(take_slots(v, slot_BK) for v in self.values),
            mask_BK,
            self.positions_BP.gather(1, slot_BK),
            self.next_position_B,
            visual_BP=None if self.visual_BP is None else self.visual_BP.gather(1, slot_BK),
            last_BD=self.last_BD,
        )

    def repeat(self, n: int) -> "PrefixCache":
        """The batch repeated n times: one prefix for several answers."""
        return PrefixCache(
            tuple(k.repeat(n, 1, 1, 1) for k in self.keys),
            tuple(v.repeat(n, 1, 1, 1) for v in self.values),
            None if self.mask_BP is None else self.mask_BP.repeat(n, 1),
            self.positions_BP.repeat(n, 1),
            self.next_position_B.repeat(n),
            visual_BP=None if self.visual_BP is None else self.visual_BP.repeat(n, 1),
            last_BD=None if self.last_BD is None else self.last_BD.repeat(n, 1),
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


@dataclass(frozen=True)
class RaggedPrefix:
    """A prefix cache with its own number of slots in every layer."""

    keys: tuple[Tensor, ...]
    """L tensors [B, H, P_l, Dh], rotated."""
    values: tuple[Tensor, ...]
    """L tensors [B, H, P_l, Dh]."""
    masks: tuple[Tensor | None, ...]
    """For each layer bool [B, P_l]: False in padding slots; None when there are none."""
    positions: tuple[Tensor, ...]
    """L tensors int64 [B, P_l]: the position each key was rotated to."""
    next_position_B: Tensor

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def n_slots(self, layer: int) -> int:
        return self.keys[layer].shape[2]

    def mask(self, layer: int) -> Tensor | None:
        return self.masks[layer]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]


def take_slots(x_BHPD: Tensor, slot_BK: Tensor) -> Tensor:
    """Keys or values [B, H, K, Dh] of the given slots."""
    return x_BHPD.gather(2, slot_BK[:, None, :, None].expand(-1, x_BHPD.shape[1], -1, x_BHPD.shape[3]))
