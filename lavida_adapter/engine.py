"""The denoising step: answer ids to logits over a stored prefix, with nothing computed that cannot have changed.

Keys of the prefix were rotated once, at the prefill. The answer's keys and values are written behind them, in place.
The last layer and the head run for the slots that may be written alone (docs/lavida.md, "Engine").

Shape letters: B batch, P prefix slots, A answer slots, M wanted slots.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lavida_adapter.attention import AttentionHook, attention_mask
from lavida_adapter.cache import PrefixCache, Slots, StoredPrefix
from lavida_adapter.llada import Llada

Open = Callable[[int], tuple[Tensor, Tensor]]
"""A layer's keys and values [B, H, P + A, Dh]."""

Step = Callable[..., Tensor]
"""`step_logits`, or what is compiled from it."""


def step_logits(
    lm: Llada,
    ids_BA: Tensor,
    want_BM: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    masks: Sequence[Tensor | None],
    open_layer: Open,
    watch: AttentionHook | None = None,
) -> Tensor:
    """Logits [B, M, W] of the wanted slots, or of all when that is None.

    `cos`, `sin`: the answer's rotary positions [B, 1, A, Dh]. `masks`: by layer, where keys may be seen, broadcastable
    to [B, H, A, P + A]; None is everywhere. `watch` looks at the queries of every slot and needs all of them wanted.
    """
    x = lm.wte(ids_BA)
    n_answer = ids_BA.shape[1]
    for i, block in enumerate(lm.layers):
        u = block.attn_norm(x)
        keys, values = open_layer(i)
        k, v = block.keys_values(u, cos, sin)
        keys[:, :, -n_answer:].copy_(k)
        values[:, :, -n_answer:].copy_(v)
        if want_BM is not None and i + 1 == len(lm.layers):
            x, u = pick(x, want_BM), pick(u, want_BM)
            cos, sin = (pick(t[:, 0].expand(len(x), -1, -1), want_BM)[:, None] for t in (cos, sin))
        x = block.mix(x, u, keys, values, cos, sin, masks[i], lm.backend, watch)
    return lm.logits(lm.ln_f(x))


def pick(x_BAD: Tensor, want_BM: Tensor) -> Tensor:
    """Rows [B, M, D] by slot."""
    return x_BAD.gather(1, want_BM[..., None].expand(-1, -1, x_BAD.shape[-1]))


class PrefixReader:
    """The slots of every layer with the prefix in them: resident, or for a packed prefix one layer's at a time."""

    def __init__(self, cache: StoredPrefix, n_layers: int, n_answer: int) -> None:
        self.cache = cache
        self.lengths = [cache.n_slots(i) for i in range(n_layers)]
        given = cache.slots if isinstance(cache, PrefixCache) else None
        if given is not None and given.n_answer == n_answer:
            self.slots = given
        elif cache.is_packed:
            self.slots = Slots(cache.layer(0)[0], [max(self.lengths)], n_answer)
        else:
            self.slots = Slots(cache.layer(0)[0], self.lengths, n_answer)
            for i in range(n_layers):
                self.slots.write(i, *cache.layer(i))

    def open(self, layer: int) -> tuple[Tensor, Tensor]:
        if not self.cache.is_packed:
            return self.slots.keys[layer], self.slots.values[layer]
        self.slots.write(0, *self.cache.layer(layer))
        end = self.lengths[layer] + self.slots.n_answer
        return self.slots.keys[0][:, :, :end], self.slots.values[0][:, :, :end]


class DecodeEngine(Protocol):
    """How prefill and steps of a language model are launched."""

    lm: Llada
    prefill: Callable[..., PrefixCache]
    """`Llada.prefill`."""

    def steps(self, cache: StoredPrefix, n_answer: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Answer ids [B, A] and wanted slots [B, M], None for all, to logits [B, M, W] over one stored prefix."""


class EagerEngine:
    """One kernel after the other."""

    def __init__(self, lm: Llada) -> None:
        self.lm, self.prefill = lm, lm.prefill

    def steps(self, cache: StoredPrefix, n_answer: int) -> "DecodeSteps":
        return DecodeSteps(self.lm, cache, n_answer)


class DecodeSteps:
    """Logits of one batch of answers, step by step, over one stored prefix."""

    def __init__(self, lm: Llada, cache: StoredPrefix, n_answer: int, step: Step = step_logits) -> None:
        self.lm, self.cache, self._step = lm, cache, step
        self.reader = PrefixReader(cache, len(lm.layers), n_answer)
        self._cos, self._sin = answer_angles(lm, cache, n_answer)
        self._masks = [step_mask(cache.mask(i), n_answer) for i in range(len(lm.layers))]

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None, watch: AttentionHook | None = None) -> Tensor:
        return self._step(self.lm, ids_BA, want_BM, self._cos, self._sin, self._masks, self.reader.open, watch)


def answer_angles(lm: Llada, cache: StoredPrefix, n_answer: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, A, Dh] of the answer's rotary positions, which begin behind the prefix's last."""
    first_B = cache.next_position_B
    return lm.angles(first_B[:, None] + torch.arange(n_answer, device=first_B.device))


def step_mask(mask_BP: Tensor | None, n_answer: int) -> Tensor | None:
    """Where an answer may look [B, 1, 1, P + A]: at the prefix's used slots and at all of itself."""
    if mask_BP is None:
        return None
    return attention_mask(torch.nn.functional.pad(mask_BP, (0, n_answer), value=True), None)
