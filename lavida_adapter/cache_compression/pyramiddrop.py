"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247) on a prefix cache: later layers keep fewer picture rows.

The paper drops picture tokens in stages while the prompt runs through the model, each time by the attention that the
last prompt token pays them in the next layer. Here the whole prompt has been computed already. The stages only decide
which rows of each layer's cache stay, and the budget is the mean over layers (docs/method.md, "pyramiddrop").

Shape letters: B batch, P prefix slots, K slots of a stage, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lavida_adapter.attention import attention_mask, attention_weights
from lavida_adapter.cache_compression.compressor import (
    CacheSelector,
    FirstStep,
    Positions,
    ShortenedCache,
    keep_best,
    turn,
)
from lavida_adapter.cache_compression.prompt_rows import gather_rows, last_slot
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.kv_cache import PrefixCache, RaggedPrefix, take_slots
from lavida_adapter.language_model import LanguageModel, rotate
from lavida_adapter.prefix import Prefix
from shirg import Budget, UserError, assert_finite

ROUNDING = 1e-9
"""A share of the depth or of the rows that misses a whole number by less than this is that number."""


class PyramidDrop(CacheSelector):
    """Keeps fewer picture rows in later layers: at each stage those that the last prompt token attends to most.

    `budget` is the mean number of picture rows over layers. A stage ranks in its first layer, among the rows that the
    stage before it kept, and its rows are those of all its layers.
    """

    after: ClassVar[Literal["prefill", "first_step"]] = "prefill"

    def __init__(
        self,
        *,
        budget: Budget,
        ratio: float | None = 0.5,
        stages: Sequence[float] = (0.25, 0.5, 0.75),
        positions: Positions = "reindex",
    ) -> None:
        """
        Args:
            ratio: rows of a stage as a share of the stage before it. How many the first stage has follows from the
                budget. None: the first stage keeps every row, and the ratio follows.
            stages: where a drop comes, as rising shares of the depth between 0 and 1.
            positions: "reindex" moves the rows of each layer up to the answer, "retain" keeps all positions.
        """
        super().__init__(budget=budget, positions=positions)
        if ratio is not None and (isinstance(ratio, bool) or not 0 < ratio <= 1):
            raise UserError(f"ratio={ratio!r}: give a share above 0 and at most 1, or null to have it solved")
        self.ratio, self.stages = ratio, tuple(stages)
        bounds = (0.0, *self.stages, 1.0)
        if not self.stages or not all(a < b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise UserError(f"stages={list(stages)}: give rising shares of the depth, above 0 and below 1")

    def check(self, prefix: Prefix, decode: DecodeConfig) -> None:
        super().check(prefix, decode)
        if decode.engine != "eager":
            raise UserError(
                f"PyramidDrop keeps fewer rows in later layers, and decode.engine={decode.engine} needs the same "
                "number in all: choose decode.engine=eager or another cache="
            )

    def __call__(
        self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None = None
    ) -> ShortenedCache:
        starts = first_layers(self.stages, len(lm.layers))
        sizes = [b - a for a, b in zip(starts, [*starts[1:], len(lm.layers)], strict=True)]
        counts = [
            rows_of_stages(n, k, sizes, self.ratio) for n, k in zip(prefix.n_visual, self.counts(prefix), strict=True)
        ]
        last = _LastToken(lm, cache, prefix, self.positions)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        stages: list[_Stage] = []
        for start, size, of_prompts in zip(starts, sizes, zip(*counts, strict=True), strict=True):
            stage = last.drop(start, of_prompts)
            for layer in range(start, start + size):
                k, v = last.layer(layer)
                keys.append(k)
                values.append(v)
                stages.append(stage)
        masks = tuple(None if s.mask is None else s.real_BK for s in stages)
        positions = tuple(s.position_BK for s in stages)
        return ShortenedCache(
            RaggedPrefix(tuple(keys), tuple(values), masks, positions, cache.next_position_B), last.alive_BP
        )


@dataclass(frozen=True)
class _Stage:
    """The rows that the layers of one stage have."""

    slot_BK: Tensor
    real_BK: Tensor
    position_BK: Tensor
    turned: tuple[Tensor, Tensor] | None
    """Cosine and signed sine that move their keys to these positions; None: they stay."""
    mask: Tensor | None


class _LastToken:
    """The last prompt token on its way through the layers; in each it sees what its stage has kept."""

    def __init__(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, positions: Positions) -> None:
        self.alive_BP = prefix.mask_BP
        self._lm, self._cache, self._prefix, self._positions = lm, cache, prefix, positions
        slot_B1 = last_slot(prefix)
        self._x_B1D = gather_rows(prefix.embeds_BPD, slot_B1)
        # Rows that are moved are moved towards the answer, so the last token's own position never changes.
        self._cos, self._sin = lm.angles(cache.positions_BP.gather(1, slot_B1))
        self._stage = self._stage_of(prefix.n_visual)

    def drop(self, layer: int, counts: Sequence[int]) -> _Stage:
        """Ranks the rows that are left by this layer's attention and keeps `counts` picture rows of each prompt."""
        block, stage = self._lm.layers[layer], self._stage
        query = block.queries(block.attention_norm(self._x_B1D), self._cos, self._sin)
        weight_BK = attention_weights(query, self._rows(layer)[0], stage.mask).mean(1)[:, 0]
        weight_BK = weight_BK.masked_fill(~stage.real_BK, float("-inf"))
        score_BP = torch.full(self.alive_BP.shape, float("-inf"), device=weight_BK.device)
        score_BP = score_BP.scatter(1, stage.slot_BK, weight_BK)
        assert_finite(score_BP, self._prefix.visual_BP & self.alive_BP, "PyramidDrop")
        self.alive_BP = keep_best(score_BP, self._prefix, tuple(counts))
        self._stage = self._stage_of(counts)
        return self._stage

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values that this layer keeps; the token goes on to the next layer."""
        k, v = self._rows(layer)
        block, x = self._lm.layers[layer], self._x_B1D
        mask = self._stage.mask
        self._x_B1D = block.output(x, block.attention_norm(x), k, v, self._cos, self._sin, mask, self._lm.backend)
        return k, v

    def _rows(self, layer: int) -> tuple[Tensor, Tensor]:
        stage = self._stage
        k, v = (take_slots(x[layer], stage.slot_BK) for x in (self._cache.keys, self._cache.values))
        return (k if stage.turned is None else rotate(k, *stage.turned)), v

    def _stage_of(self, counts: Sequence[int]) -> _Stage:
        given = zip(self._prefix.n_tokens, self._prefix.n_visual, counts, strict=True)
        lengths = [total - visual + kept for total, visual, kept in given]
        n = max(lengths)
        slot_BK = torch.sort(~self.alive_BP, dim=-1, stable=True).indices[:, :n]
        place_BK = torch.arange(n, device=slot_BK.device).expand(len(slot_BK), -1)
        length_B1 = self.alive_BP.sum(-1, keepdim=True)
        real_BK = place_BK < length_B1
        position_BK = self._cache.positions_BP.gather(1, slot_BK)
        turned = None
        if self._positions == "reindex":
            moved_BK = self._cache.next_position_B[:, None] - length_B1 + place_BK
            turned = turn(self._lm, position_BK, moved_BK)
            position_BK = moved_BK
        mask = None if min(lengths) == n else attention_mask(real_BK, None)
        return _Stage(slot_BK, real_BK, position_BK, turned, mask)


def first_layers(stages: Sequence[float], n_layers: int) -> list[int]:
    """The first layer of each stage, 0 for the one before all drops. A stage that no layer is left for is not there.

    Raises:
        UserError: when the model has no layer behind the first drop.
    """
    wanted = [math.ceil(share * n_layers - ROUNDING) for share in stages]
    starts = [0, *sorted({start for start in wanted if start < n_layers})]
    if len(starts) == 1:
        raise UserError(
            f"stages={list(stages)}: none of the {n_layers} layers of the model lies behind them; give smaller shares"
        )
    return starts


def rows_of_stages(n: int, budget: int, sizes: Sequence[int], ratio: float | None) -> list[int]:
    """How many of a prompt's `n` picture rows each stage keeps, such that the mean over layers is the budget.

    `sizes`: layers of each stage. If they are equal the mean is exact; else it may be too small by less than one row.

    Raises:
        UserError: when the first stage alone, with every row, has more than the budget allows.
    """
    total = budget * sum(sizes)
    shares = _heights(n, total, sizes, ratio) if ratio is not None else _solved(n, budget, sizes)
    rows = [min(n, math.floor(share + ROUNDING)) for share in shares]
    left = total - sum(size * r for size, r in zip(sizes, rows, strict=True))
    # Rounding down leaves less than one row a layer; the stages that lost most by it get one more.
    for i in sorted(range(len(sizes)), key=lambda i: rows[i] - shares[i]):
        if sizes[i] <= left and rows[i] < (n if i == 0 else rows[i - 1]):
            rows[i] += 1
            left -= sizes[i]
    return rows


def _heights(n: int, total: int, sizes: Sequence[int], ratio: float) -> list[float]:
    """min(n, c ratio^s) for each stage s, with the c for which all layers together have `total` rows."""
    powers = [ratio**s for s in range(len(sizes))]
    height = 0.0
    for full in range(len(sizes)):
        rest = sum(size * power for size, power in zip(sizes[full:], powers[full:], strict=True))
        height = (total - n * sum(sizes[:full])) / rest
        if height * powers[full] <= n:
            break
    return [min(n, height * power) for power in powers]


def _solved(n: int, budget: int, sizes: Sequence[int]) -> list[float]:
    """n ratio^s for each stage s, with the ratio for which the mean over layers is the budget."""
    if budget * sum(sizes) < n * sizes[0]:
        raise UserError(
            f"PyramidDrop: budget {budget} is less than the {n} rows of the first {sizes[0]} of {sum(sizes)} layers "
            "alone, which ratio=null keeps whole: raise cache.budget= or give cache.ratio="
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(size * n * middle**s for s, size in enumerate(sizes)) / sum(sizes)
        low, high = (middle, high) if mean < budget else (low, middle)
    return [n * high**s for s in range(len(sizes))]
