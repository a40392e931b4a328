"""Base classes of the methods that make a prefix cache smaller (docs/method.md, "Cache selectors", "Packed caches").

A `CacheSelector` keeps some picture rows. A token selector (`shirg.Selector`) decides before the language model runs; a
cache selector decides after it: it may read the model's attention, and needs a prefill of every picture token. A
`CachePacker` stores rows in fewer bits, or other rows in every layer. Both act once; then no step changes the cache.

Shape letters: B batch, P prefix slots, K kept slots, A answer slots, W vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lavida_adapter.attention import AttentionHook, attention_weights
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.generate import FillingSteps
from lavida_adapter.kv_cache import PrefixCache, StoredPrefix
from lavida_adapter.language_model import LanguageModel, cos_signed_sin, rotary_phase, rotate
from lavida_adapter.prefix import Prefix
from shirg import Budget, UserError, assert_finite, send, stable_topk

Positions = Literal["retain", "reindex"]


@dataclass(frozen=True)
class FirstStep:
    """What a selector may read of the first denoising step."""

    attention_BAP: Tensor
    """float32: from each answer slot to each slot of the prefix, averaged over heads and layers."""
    masked_BA: Tensor
    """bool: slots that were masked before the step: those that it chose from."""
    open_BA: Tensor
    """bool: slots that are still masked after the step."""
    logits_BAW: Tensor
    """The step's predictions for each answer slot."""


class AttentionMean:
    """An `AttentionHook` that averages the attention of all queries to the first P keys over heads and layers."""

    def __init__(self, n_prefix: int) -> None:
        self._n_prefix = n_prefix
        self._n_layers = 0
        self._sum_BAP: Tensor | None = None

    def __call__(self, q_BHAD: Tensor, k_BHKD: Tensor, mask: Tensor | None) -> None:
        layer_BAP = attention_weights(q_BHAD, k_BHKD, mask).mean(1)[..., : self._n_prefix]
        self._sum_BAP = layer_BAP if self._sum_BAP is None else self._sum_BAP + layer_BAP
        self._n_layers += 1

    @property
    def mean_BAP(self) -> Tensor:
        assert self._sum_BAP is not None
        return self._sum_BAP / self._n_layers


@dataclass(frozen=True)
class ShortenedCache:
    """A shortened cache, and which slots of the prefix are still in it."""

    cache: StoredPrefix
    kept_BP: Tensor
    """bool: the slots that every layer still has."""


class CacheSelector:
    """Keeps the `budget` best picture rows of a prefix cache; text always stays. Subclasses override `score`.

    Newline rows belong to the picture: they are ranked and counted like its other rows. A method that keeps other rows
    in each layer overrides `__call__` instead.
    """

    after: ClassVar[Literal["prefill", "first_step"]]
    """When it decides: after the prefill, or after the first denoising step."""

    def __init__(self, *, budget: Budget, positions: Positions) -> None:
        """`budget`: picture rows per prompt; "matched" is as many as the base model would feed.

        `positions`: "retain" keeps all positions, "reindex" rotates the keys to consecutive positions.
        """
        if budget == "matched":
            self.budget: int | Literal["matched"] = "matched"
        elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
            self.budget = budget
        else:
            raise UserError(f"budget={budget!r}: give a positive number of tokens or 'matched'")
        if positions not in get_args(Positions):
            raise UserError(f"positions={positions!r}: choose retain or reindex")
        self.positions: Positions = positions

    def score(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        """Scores [B, P] in float32; larger is kept first. Only those of picture slots count.

        `first` is None if `after` is "prefill".
        """
        raise NotImplementedError(f"{type(self).__name__} must override score")

    def kept_counts(self, prefix: Prefix, first: FirstStep | None, counts: tuple[int, ...]) -> Tensor | None:
        """How many of its `counts` each prompt keeps [B], if content decides; None: all. Shapes do not change."""
        return None

    def check(self, prefix: Prefix, decode: DecodeConfig) -> None:
        """Checks that this selector can shorten the cache, before anything is computed.

        Raises:
            UserError: without a cache, or for a budget larger than the picture.
        """
        name = type(self).__name__
        if not decode.prefix_cache:
            raise UserError(
                f"{name} shortens the prefix cache, and decode.prefix_cache=false has none: choose cache=none"
            )
        self.counts(prefix)

    def check_steps(self, prefix: Prefix, filling: Sequence[FillingSteps]) -> None:
        """Checks that the answers have steps that can read the shortened cache.

        `filling`: of each answer, the most that there can be. If the content of an answer makes them fewer, it may be
        complete before the cut; `Generation.cached_BP` tells.

        Raises:
            UserError: for an answer without such a step. After the first step, also for answers of which one has its
                first step before another one: the cut would be made by a step that does nothing for that answer.
        """
        check_is_read(self, prefix, filling)
        if self.after == "prefill":
            return
        name = type(self).__name__
        for i, steps in enumerate(filling):
            if len(steps) < 2:
                raise UserError(
                    f"{name} decides after the first denoising step, and the answer to {prefix.name_of(i)} takes only "
                    "one: choose a longer answer (decode.max_new_tokens), more steps, another decode.schedule or "
                    "cache=none"
                )
            if steps[0] != filling[0][0]:
                raise UserError(
                    f"{name} decides after the first denoising step, which comes at different times for "
                    f"{prefix.name_of(0)} and {prefix.name_of(i)} because of their drafts: answer one prompt at a "
                    "time (batch_size=1), or choose cache=none"
                )

    def counts(self, prefix: Prefix) -> tuple[int, ...]:
        """How many picture rows each prompt keeps, known before the scores are."""
        wanted = prefix.n_matched if self.budget == "matched" else (self.budget,) * len(prefix.n_visual)
        if not wanted:
            raise UserError(f"{type(self).__name__}: budget=matched needs a prefix made by encode; give a number")
        for i, (count, n) in enumerate(zip(wanted, prefix.n_visual, strict=True)):
            if count > n:
                raise UserError(
                    f"{type(self).__name__}: budget {count} is larger than the {n} picture tokens in the prefix of "
                    f"{prefix.name_of(i)}; lower cache.budget= or choose a selector that feeds more"
                )
        return wanted

    def __call__(
        self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None = None
    ) -> ShortenedCache:
        """The shortened cache; its rows stay in reading order."""
        scores_BP = self.score(lm, cache, prefix, first).float()
        assert_finite(scores_BP, prefix.visual_BP, type(self).__name__)
        counts = self.counts(prefix)
        count_B = self.kept_counts(prefix, first, counts)
        kept_BP = keep_best(scores_BP, prefix, counts, count_B)
        given = zip(prefix.n_tokens, prefix.n_visual, counts, strict=True)
        lengths = [total - visual + kept for total, visual, kept in given]
        n = max(lengths)
        slot_BK = torch.sort(~kept_BP, dim=-1, stable=True).indices[:, :n]
        is_real_BK = torch.arange(n, device=kept_BP.device) < kept_BP.sum(-1, keepdim=True)
        full = count_B is None and min(lengths) == n
        short = cache.take(slot_BK, None if full else is_real_BK)
        return ShortenedCache(reindex(short, lm) if self.positions == "reindex" else short, kept_BP)


Packed = tuple[Tensor, ...]
"""One tensor [B, H, P, Dh] in its packed form."""


@dataclass(frozen=True)
class PackedPrefix:
    """A prefix cache in the packed form of its `CachePacker`; a layer is unpacked each time it is read."""

    keys: tuple[Packed, ...]
    values: tuple[Packed, ...]
    packer: "CachePacker"
    dtype: torch.dtype
    """Of the model, which unpacked numbers have."""
    mask_BP: Tensor | None
    next_position_B: Tensor
    length: int

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for packed in (*self.keys, *self.values) for t in packed)

    def n_slots(self, layer: int) -> int:
        return self.length

    def mask(self, layer: int) -> Tensor | None:
        return self.mask_BP

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.packer.unpack(self.keys[layer], self.dtype), self.packer.unpack(self.values[layer], self.dtype)

    def unpack_into(self, layer: int, keys_BHPD: Tensor, values_BHPD: Tensor) -> None:
        """Writes the keys and values of a layer to buffers of the model's dtype."""
        self.packer.unpack_into(self.keys[layer], keys_BHPD)
        self.packer.unpack_into(self.values[layer], values_BHPD)


class CachePacker:
    """Makes a prefix cache smaller, once, after the prefill. Subclasses pack and unpack one tensor [B, H, P, Dh]."""

    def check(self, prefix: Prefix, decode: DecodeConfig) -> None:
        """Raises UserError without a cache, or with an engine that cannot unpack one."""
        name = type(self).__name__
        if not decode.prefix_cache:
            raise UserError(f"{name} packs the prefix cache, and decode.prefix_cache=false has none: choose cache=none")
        if decode.engine != "eager":
            raise UserError(f"{name} is unpacked at every step: choose decode.engine=eager or cache=none")

    def check_steps(self, prefix: Prefix, filling: Sequence[FillingSteps]) -> None:
        """Raises UserError for an answer without a step, which is all that reads the packed cache."""
        check_is_read(self, prefix, filling)

    def hook(self, prefix: Prefix) -> AttentionHook | None:
        """An attention hook for the prefill, if the method needs one; it is passed to `__call__`."""
        return None

    def __call__(self, cache: PrefixCache, prefix: Prefix, seen: AttentionHook | None) -> StoredPrefix:
        return PackedPrefix(
            tuple(self.pack(k, cache.mask_BP) for k in cache.keys),
            tuple(self.pack(v, cache.mask_BP) for v in cache.values),
            self,
            cache.values[0].dtype,
            cache.mask_BP,
            cache.next_position_B,
            cache.n_slots(0),
        )

    def pack(self, x_BHPD: Tensor, mask_BP: Tensor | None) -> Packed:
        raise NotImplementedError(f"{type(self).__name__} must override pack")

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must override unpack")

    def unpack_into(self, packed: Packed, out_BHPD: Tensor) -> None:
        """`unpack`, written to a buffer of the wanted dtype; what each denoising step calls."""
        out_BHPD.copy_(self.unpack(packed, out_BHPD.dtype))


def check_is_read(method: CacheSelector | CachePacker, prefix: Prefix, filling: Sequence[FillingSteps]) -> None:
    """Raises UserError for an answer that no step fills: then nothing ever reads the smaller cache."""
    for i, steps in enumerate(filling):
        if not steps:
            raise UserError(
                f"{type(method).__name__} is for the denoising steps, and the answer to {prefix.name_of(i)} takes "
                "none: choose a longer answer (decode.max_new_tokens) or cache=none"
            )


def keep_best(scores_BP: Tensor, prefix: Prefix, counts: tuple[int, ...], kept_B: Tensor | None = None) -> Tensor:
    """bool [B, P]: all text, and each row's `counts` best picture slots (the first ones of equal scores).

    `kept_B`: at most so many of them.
    """
    other_BP = ~prefix.visual_BP
    ranked_BK = stable_topk(scores_BP.masked_fill(other_BP, float("-inf")), max(counts))
    count_B = send(torch.tensor(counts), scores_BP.device)
    count_B1 = (count_B if kept_B is None else torch.minimum(count_B, kept_B))[:, None]
    is_kept_BK = torch.arange(max(counts), device=scores_BP.device) < count_B1
    text_BP = prefix.mask_BP & other_BP
    return torch.zeros_like(text_BP).scatter(1, ranked_BK, is_kept_BK) | text_BP


def reindex(cache: PrefixCache, lm: LanguageModel) -> PrefixCache:
    """The same rows at positions 0, 1, 2, ...: keys are rotated by the difference, and the answer follows directly."""
    b, n = cache.positions_BP.shape
    new_BP = torch.arange(n, device=cache.positions_BP.device).expand(b, n)
    cos, sin = turn(lm, cache.positions_BP, new_BP)
    length_B = torch.full_like(cache.next_position_B, n) if cache.mask_BP is None else cache.mask_BP.sum(-1)
    keys = tuple(rotate(k, cos, sin) for k in cache.keys)
    return PrefixCache(keys, cache.values, cache.mask_BP, new_BP, length_B)


def turn(lm: LanguageModel, old_BP: Tensor, new_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [B, 1, P, Dh] for `rotate` that move keys from old to new positions.

    The difference is taken between the float32 angles, so the result equals a prefill at the new positions up to the
    rounding of one more product.
    """
    old, new = (rotary_phase(p, lm.config.head_dim, lm.config.rope_theta).double() for p in (old_BP, new_BP))
    cos, sin = cos_signed_sin(new - old)
    return cos.float(), sin.float()
