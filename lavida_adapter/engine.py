"""The denoising step: answer ids to logits over a prefix cache; eager, or compiled for a CPU.

docs/lavida.md, "Engine". The keys of the prefix were rotated once, in the prefill. The answer's keys and values are
written behind them in place. The last layer and the head run only for the slots whose logits are wanted.

Shape letters: B batch, P prefix slots, A answer slots, M wanted slots, K = P + A keys, W vocabulary.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from lavida_adapter.attention import AttentionHook
from lavida_adapter.cache_compression.compressor import (
    AttentionMean,
    CacheSelector,
    FirstStep,
    PackedPrefix,
    ShortenedCache,
)
from lavida_adapter.cpu_kernels import can_pack, compiler, packed_copy, state_of
from lavida_adapter.kv_cache import PrefixCache, Slots, StoredPrefix
from lavida_adapter.language_model import LanguageModel, pick
from lavida_adapter.prefix import Prefix
from lavida_adapter.prefix_attention import SeenKeys
from lavida_adapter.sampling import LogitsFn
from lavida_adapter.timing import Timer

OpenLayer = Callable[[int], tuple[Tensor, Tensor]]
"""Layer number -> its buffers of keys and values [B, H, P + A, Dh], with the prefix in them."""

Step = Callable[..., Tensor]
"""`step_logits`, or its compiled form."""


def step_logits(
    lm: LanguageModel,
    ids_BA: Tensor,
    want_BM: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    seen: Sequence[SeenKeys],
    open_layer: OpenLayer,
    hook: AttentionHook | None = None,
) -> Tensor:
    """Logits [B, M, W] of the wanted slots (None: all).

    `cos`, `sin`: the answer's rotary positions [B, 1, A, Dh]. `seen`: the keys of each layer that may be seen. A `hook`
    needs `want_BM=None`.
    """
    row_BM = lm.source_rows(want_BM, ids_BA)
    only_BM = None if hook is not None else row_BM  # a hook sees the queries of all slots
    x = lm.embedding(ids_BA)
    n_answer = ids_BA.shape[1]
    for i, block in enumerate(lm.layers):
        u = block.attention_norm(x)
        keys, values = open_layer(i)
        k, v = block.keys_values(u, cos, sin)
        keys[:, :, -n_answer:].copy_(k)
        values[:, :, -n_answer:].copy_(v)
        if only_BM is not None and i + 1 == len(lm.layers):
            x, u = pick(x, only_BM), pick(u, only_BM)
            cos, sin = (pick(t[:, 0].expand(len(x), -1, -1), only_BM)[:, None] for t in (cos, sin))
        q = block.queries(u, cos, sin)
        if hook is not None:
            hook(q, keys, seen[i].mask)
        x = block.finish(x, seen[i].attend(q, keys, values, lm.backend).flatten(-2))
    if only_BM is None and row_BM is not None:
        x = pick(x, row_BM)
    return lm.logits(lm.final_norm(x))


class PrefixReader:
    """The buffers of each layer with the prefix in them; of a packed cache, one layer at a time is unpacked."""

    def __init__(self, cache: StoredPrefix, n_layers: int, n_answer: int) -> None:
        self.cache = cache
        self.lengths = [cache.n_slots(i) for i in range(n_layers)]
        given = cache.slots if isinstance(cache, PrefixCache) else None
        if given is not None and given.n_answer == n_answer:
            self.slots = given
        elif isinstance(cache, PackedPrefix):
            self.slots = Slots.blank(cache.layer(0)[0], [max(self.lengths)], n_answer)
        else:
            self.slots = Slots.blank(cache.layer(0)[0], self.lengths, n_answer)
            for i in range(n_layers):
                self.slots.write(i, *cache.layer(i))

    def open(self, layer: int) -> tuple[Tensor, Tensor]:
        if not isinstance(self.cache, PackedPrefix):
            return self.slots.keys[layer], self.slots.values[layer]
        n, (keys,), (values,) = self.lengths[layer], self.slots.keys, self.slots.values
        self.cache.unpack_into(layer, keys[:, :, :n], values[:, :, :n])
        end = n + self.slots.n_answer
        return keys[:, :, :end], values[:, :, :end]


class DecodeEngine(Protocol):
    """Runs the prefill and the denoising steps of a language model."""

    lm: LanguageModel

    def prefill(
        self,
        embeds_BPD: Tensor,
        mask_BP: Tensor | None = None,
        visual_BP: Tensor | None = None,
        n_answer: int = 0,
        hook: AttentionHook | None = None,
        lengths: Sequence[int] | None = None,
    ) -> PrefixCache:
        """`LanguageModel.prefill`; with `lengths` its `prefill_joined`, which has neither `visual_BP` nor a hook."""

    def steps(self, cache: StoredPrefix, n_answer: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The step function over one cache: ids [B, A] and wanted slots [B, M] (None: all) -> logits [B, M, W]."""


class EagerEngine:
    """Runs one kernel after the other."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def prefill(
        self,
        embeds_BPD: Tensor,
        mask_BP: Tensor | None = None,
        visual_BP: Tensor | None = None,
        n_answer: int = 0,
        hook: AttentionHook | None = None,
        lengths: Sequence[int] | None = None,
    ) -> PrefixCache:
        if lengths is None:
            return self.lm.prefill(embeds_BPD, mask_BP, visual_BP, n_answer, hook)
        assert mask_BP is not None and visual_BP is None and hook is None
        return self.lm.prefill_joined(embeds_BPD, mask_BP, lengths, n_answer)

    def steps(self, cache: StoredPrefix, n_answer: int) -> "DecodeSteps":
        return DecodeSteps(self.lm, cache, n_answer)


class DecodeSteps:
    """The eager step function over one prefix cache."""

    def __init__(self, lm: LanguageModel, cache: StoredPrefix, n_answer: int, step: Step = step_logits) -> None:
        self.lm, self.cache, self._step = lm, cache, step
        self.reader = PrefixReader(cache, len(lm.layers), n_answer)
        self._cos, self._sin = answer_angles(lm, cache, n_answer)
        masks = [cache.mask(i) for i in range(len(lm.layers))]
        made = {id(mask): SeenKeys.of(mask, n_answer) for mask in {id(mask): mask for mask in masks}.values()}
        self._seen = [made[id(mask)] for mask in masks]  # most caches have one mask for all layers

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None, hook: AttentionHook | None = None) -> Tensor:
        return self._step(self.lm, ids_BA, want_BM, self._cos, self._sin, self._seen, self.reader.open, hook)


def answer_angles(lm: LanguageModel, cache: StoredPrefix, n_answer: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [B, 1, A, Dh] of the answer's rotary positions, which follow the prefix's last one."""
    first_B = cache.next_position_B
    return lm.angles(first_B[:, None] + torch.arange(n_answer, device=first_B.device))


class CachedSteps:
    """The step function of a whole generation; a selector shortens the cache after the prefill or after the first step.

    Shortening is timed as the stage "cache". Recording the first step's attention counts as denoising.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prefix: Prefix,
        cache: StoredPrefix,
        n_answer: int,
        selector: CacheSelector | None,
        timer: Timer,
        engine: DecodeEngine | None = None,
    ) -> None:
        """`engine`: None is eager. A first step whose attention is recorded is always eager."""
        self.lm, self.prefix, self.timer = lm, prefix, timer
        self.cache: StoredPrefix = cache
        self._n_answer = n_answer
        self._engine = engine or EagerEngine(lm)
        self._steps: LogitsFn | None = None
        self._kept_BP = prefix.mask_BP
        self._selector = selector
        self._pending = selector
        self._seen: tuple[AttentionMean, Tensor, Tensor] | None = None
        if selector is not None and selector.after == "prefill":
            self._cut(None)

    def read_BP(self, steps: Sequence[int]) -> Tensor | None:
        """bool [B, P]: slots of the prefix that each answer's last step could read; None without a selector.

        `steps`: how many each answer took. The cut after the first one comes too late for an answer that took no more,
        whatever the other answers of its batch did.
        """
        if self._selector is None or self._selector.after == "prefill" or min(steps) > 1:
            return None if self._selector is None else self._kept_BP
        pairs = zip(steps, self._kept_BP, self.prefix.mask_BP, strict=True)
        return torch.stack([kept_P if n > 1 else mask_P for n, kept_P, mask_P in pairs])

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        if self._seen is not None:
            attention, masked_BA, logits_BAW = self._seen
            open_BA = ids_BA == self.lm.config.mask_token_id
            self._cut(FirstStep(attention.mean_BAP, masked_BA, open_BA, logits_BAW))
        if self._pending is not None:
            hook = AttentionMean(self.cache.n_slots(0))
            logits_BAW = DecodeSteps(self.lm, self.cache, self._n_answer)(ids_BA, hook=hook)
            # The loop may write to its argument.
            self._seen = hook, ids_BA == self.lm.config.mask_token_id, logits_BAW.clone()
            return logits_BAW if want_BM is None else pick(logits_BAW, want_BM)
        if self._steps is None:
            self._steps = self._engine.steps(self.cache, self._n_answer)
        return self._steps(ids_BA, want_BM)

    def _cut(self, first: FirstStep | None) -> None:
        assert self._pending is not None and isinstance(self.cache, PrefixCache)
        with self.timer.stage("cache"):
            cut: ShortenedCache = self._pending(self.lm, self.cache, self.prefix, first)
        self.cache, self._kept_BP, self._pending, self._seen = cut.cache, cut.kept_BP, None, None
        self._steps = None


class CompiledEngine:
    """Compiled prefill and steps for a CPU; on CUDA `lavida_adapter.captured_steps` compiles what it captures.

    torch compiles at the first call for each kind of input: one prompt or several, padded or not. The number of prefix
    tokens is a dynamic shape. The prefill of unequal prompts one behind the other is not compiled: it is faster than
    the compiled one with padding, and would be compiled for each number of prompts.

    In float32 the kernels of `lavida_adapter.cpu_kernels` run, on packed copies of the weights.
    """

    def __init__(self, lm: LanguageModel) -> None:
        """
        Raises:
            UserError: on a CPU without a C++ compiler.
        """
        self.lm = lm
        compiler()
        self._state: tuple[object, ...] = ()
        self._find_weights()

    def _find_weights(self) -> None:
        """Packs the weights again where they have changed."""
        if state_of(self.lm) == self._state:
            return
        self._state = state_of(self.lm)
        self._run = packed_copy(self.lm) if can_pack(self.lm) else self.lm
        self._step = _compiled(step_logits, private=self._run is not self.lm)
        self._prefill: Callable[..., PrefixCache] = _compiled(self._run.prefill)

    def prefill(
        self,
        embeds_BPD: Tensor,
        mask_BP: Tensor | None = None,
        visual_BP: Tensor | None = None,
        n_answer: int = 0,
        hook: AttentionHook | None = None,
        lengths: Sequence[int] | None = None,
    ) -> PrefixCache:
        self._find_weights()
        if lengths is not None:
            return EagerEngine(self._run).prefill(embeds_BPD, mask_BP, visual_BP, n_answer, hook, lengths)
        # Computed outside, because the compiler would compute them again at every use.
        angles = self.lm.angles(torch.arange(embeds_BPD.shape[1], device=embeds_BPD.device)[None])
        return self._prefill(embeds_BPD, mask_BP, visual_BP, n_answer, hook, angles=angles)

    def steps(self, cache: StoredPrefix, n_answer: int) -> "CompiledSteps":
        self._find_weights()
        return CompiledSteps(DecodeSteps(self._run, cache, n_answer, self._step))


def _compiled(function: Callable[..., Any], *, private: bool = False) -> Callable[..., Any]:
    """The function compiled for inputs of any length.

    `private`: it gets a model that nothing else changes, so that whether its modules are still the same is not asked
    at each step, which takes a twentieth of a small one. Other engines then must not share what was compiled.
    """
    options: dict[str, Any] = {"cpp_wrapper": True}  # a C++ launcher saves a tenth of a small step
    own: dict[str, Any] = {}
    if private and "isolate_recompiles" in signature(torch.compile).parameters:  # of later versions of torch
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        own["isolate_recompiles"] = True
    return torch.compile(function, dynamic=True, options=options, **own)


class CompiledSteps:
    """Compiled steps that always get wanted slots: with None torch would compile a second function."""

    def __init__(self, steps: DecodeSteps) -> None:
        self._steps = steps

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None) -> Tensor:
        if want_BM is None:
            want_BM = torch.arange(ids_BA.shape[1], device=ids_BA.device).expand(len(ids_BA), -1)
        return self._steps(ids_BA, want_BM)
