"""Selectors behind the prefix: which picture rows of the cache stay, decided once (docs/method.md, "Cache selectors").

A selector of tokens (`shirg.Selector`) decides before the language model has seen anything. A cache selector decides
after it: it may look at the model's own attention, and pays for that with a prefill of every picture token. Both keep
the promise of the prefix cache: it is cut once, and then no step changes it.

Shape letters: B batch, P prefix slots, K kept slots, A answer slots.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lavida_adapter.generate import DecodeConfig
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.llada import Llada, rotary_phase, rotate, turn
from lavida_adapter.prefix import Prefix
from shirg import Budget, UserError, assert_finite, stable_topk

Positions = Literal["retain", "reindex"]


@dataclass(frozen=True)
class FirstStep:
    """What a selector may know of the first denoising step."""

    attention_BAP: Tensor
    """float32: from each answer slot to each slot of the prefix, averaged over heads and layers."""
    open_BA: Tensor
    """bool: slots that the step left masked."""
    logits_BAW: Tensor
    """What the step predicted for each answer slot."""


@dataclass(frozen=True)
class ShortenedCache:
    """A cache that was cut, and which slots [B, P] of the prefix are left in it."""

    cache: PrefixCache
    kept_BP: Tensor


class CacheSelector:
    """Keeps the `budget` best picture rows of a prefix cache; text always stays. Subclasses score.

    Newline rows belong to the picture: they are ranked and counted like its other rows. `positions`: "retain" leaves
    keys and answer where they were, "reindex" closes the gaps by rotating keys to consecutive positions.
    """

    after: ClassVar[Literal["prefill", "first_step"]]
    """When it decides."""

    def __init__(self, *, budget: Budget, positions: Positions) -> None:
        """`budget`: picture rows per prompt; "matched": as many as the base model would feed."""
        is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
        if not (budget == "matched" or is_count):
            raise UserError(f"budget={budget!r}: give a positive number of tokens or 'matched'")
        if positions not in get_args(Positions):
            raise UserError(f"positions={positions!r}: choose retain or reindex")
        self.budget: Budget = budget
        self.positions: Positions = positions

    def score(self, lm: Llada, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        """Scores [B, P] in float32; larger is kept first. Picture slots alone are read; no `first` after prefill."""
        raise NotImplementedError(f"{type(self).__name__} must override score")

    def deserved(self, prefix: Prefix, first: FirstStep | None, counts: tuple[int, ...]) -> Tensor | None:
        """How many of its `counts` each prompt keeps [B], where that depends on content; None: all. Shapes stay."""
        return None

    def check(self, prefix: Prefix, decode: DecodeConfig) -> None:
        """Refuses what this selector cannot do, before anything is computed.

        Raises:
            UserError: without a cache, without a step that could use the shorter one, or for too large a budget.
        """
        name = type(self).__name__
        if not decode.prefix_cache:
            raise UserError(
                f"{name} shortens the prefix cache, and with decode.prefix_cache=false there is none: choose cache=none"
            )
        if self.after == "first_step" and decode.steps < 2:
            raise UserError(
                f"{name} decides after the first denoising step, and this decoding has no other: choose more steps or "
                "cache=none"
            )
        self.counts(prefix)

    def counts(self, prefix: Prefix) -> tuple[int, ...]:
        """How many picture rows each prompt keeps; on the host, so that shapes are known without looking at scores."""
        wanted = prefix.n_matched if self.budget == "matched" else (self.budget,) * len(prefix.n_visual)
        if not wanted:
            raise UserError(f"{type(self).__name__}: budget=matched needs a prefix made by encode; give a number")
        for i, (count, n) in enumerate(zip(wanted, prefix.n_visual, strict=True)):
            if count > n:
                raise UserError(
                    f"{type(self).__name__}: budget {count} is larger than the {n} picture tokens in the prefix of "
                    f"prompt {i} of the batch; lower cache.budget= or choose a selector that feeds more"
                )
        return wanted

    def __call__(self, lm: Llada, cache: PrefixCache, prefix: Prefix, first: FirstStep | None = None) -> ShortenedCache:
        """The cache without the rows that are not worth keeping; what is left stays in reading order."""
        scores_BP = self.score(lm, cache, prefix, first).float()
        assert_finite(scores_BP, prefix.visual_BP, type(self).__name__)
        counts = self.counts(prefix)
        deserved_B = self.deserved(prefix, first, counts)
        kept_BP = keep_best(scores_BP, prefix, counts, deserved_B)
        given = zip(prefix.n_tokens, prefix.n_visual, counts, strict=True)
        lengths = [total - visual + kept for total, visual, kept in given]
        n = max(lengths)
        slot_BK = torch.sort(~kept_BP, dim=-1, stable=True).indices[:, :n]
        is_real_BK = torch.arange(n, device=kept_BP.device) < kept_BP.sum(-1, keepdim=True)
        full = deserved_B is None and min(lengths) == n
        short = cache.take(slot_BK, None if full else is_real_BK)
        return ShortenedCache(reindex(short, lm) if self.positions == "reindex" else short, kept_BP)


def keep_best(scores_BP: Tensor, prefix: Prefix, counts: tuple[int, ...], deserved_B: Tensor | None = None) -> Tensor:
    """Slots [B, P] that stay: all text, and each row's `counts` best picture slots; equal scores go to the first.

    With `deserved_B`, only so many of them.
    """
    ranked_BK = stable_topk(scores_BP.masked_fill(~prefix.visual_BP, float("-inf")), max(counts))
    count_B = torch.tensor(counts, device=scores_BP.device)
    count_B1 = (count_B if deserved_B is None else torch.minimum(count_B, deserved_B))[:, None]
    is_kept_BK = torch.arange(max(counts), device=scores_BP.device) < count_B1
    text_BP = prefix.mask_BP & ~prefix.visual_BP
    return torch.zeros_like(text_BP).scatter(1, ranked_BK, is_kept_BK) | text_BP


def reindex(cache: PrefixCache, lm: Llada) -> PrefixCache:
    """The same rows at positions 0, 1, 2, ...: keys are rotated by the difference, the answer moves up.

    The difference is taken between the angles as float32 rounds them, so the result is what a prefill at the new
    positions would have rotated to, up to the rounding of one more product.
    """
    b, n = cache.positions_BP.shape
    new_BP = torch.arange(n, device=cache.positions_BP.device).expand(b, n)
    old, new = (
        rotary_phase(p, lm.config.head_dim, lm.config.rope_theta).double() for p in (cache.positions_BP, new_BP)
    )
    cos, sin = (t.float() for t in turn(new - old))
    length_B = torch.full_like(cache.next_position_B, n) if cache.mask_BP is None else cache.mask_BP.sum(-1)
    keys = tuple(rotate(k, cos, sin) for k in cache.keys)
    return PrefixCache(keys, cache.values, cache.mask_BP, new_BP, length_B)
