"""AdaptiveK: the first step's uncertainty decides how many picture rows stay (docs/method.md, "adaptive_k")."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lavida_adapter.cache_compression.compressor import CacheSelector, FirstStep, Positions
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prefix import Prefix, used_first
from shirg import Budget, Share, UserError, send


class AdaptiveK(CacheSelector):
    """Keeps fewer picture rows for an answer that the first denoising step is certain of.

    The first step reads the whole prefix. Its least certain masked slot has exp(entropy) candidates: the number of
    equally likely tokens with the same entropy. Each bound in `candidates` that it exceeds raises the level by one. The
    rows with the highest scores of the token selector stay; synthesised rows (scaffold, summary, newlines) always stay.
    The shape is that of the last level; slots above the prompt's own level are masked.

    Args:
        budget: picture rows of the last level; "matched": as many as the base model would feed.
        levels: rising shares of the budget that end with 1; the default gives 512, 768 and 1024 rows of 1024.
        candidates: rising bounds above 1, one fewer than levels.
        positions: "retain" keeps all positions, "reindex" rotates the keys to consecutive positions.
    """

    after: ClassVar[Literal["prefill", "first_step"]] = "first_step"

    def __init__(
        self,
        *,
        budget: Budget,
        levels: Sequence[float] = (0.5, 0.75, 1.0),
        candidates: Sequence[float] = (1.5, 3.0),
        positions: Positions = "retain",
    ) -> None:
        super().__init__(budget=budget, positions=positions)
        self.levels, self.candidates = tuple(levels), tuple(candidates)
        if not (_rises(self.levels) and 0 < self.levels[0] and self.levels[-1] == 1):
            raise UserError(f"levels={list(levels)}: give rising shares of the budget that end with 1")
        if len(self.candidates) != len(self.levels) - 1 or not (_rises(self.candidates) and min(self.candidates) > 1):
            raise UserError(f"candidates={list(candidates)}: give rising numbers above 1, one fewer than levels")

    def check(self, prefix: Prefix, decode: DecodeConfig) -> None:
        super().check(prefix, decode)
        for i, selection in enumerate(prefix.selections):
            if selection.scores_BN is None:
                raise UserError(
                    f"AdaptiveK ranks by the token selector's scores, and {prefix.name_of(i)} has none: choose a "
                    "selector= that scores tokens"
                )

    def score(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        rows = []
        lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
        for visual_P, selection in zip(prefix.visual_BP, prefix.selections, strict=True):
            assert selection.scores_BN is not None
            index_T = selection.index_BT.gather(1, used_first(selection.mask_BT))[0]
            kept_T = selection.scores_BN[0][index_T.clamp_min(0)].float()
            # A token that the selector kept without ranking it has the score -inf and comes last. A NaN stays one, and
            # is refused. Synthesised rows rank above every token of the picture.
            score_T = kept_T.clamp_min(lowest).masked_fill(index_T < 0, highest)
            rows.append(torch.zeros_like(visual_P, dtype=torch.float32).masked_scatter(visual_P, score_T))
        return torch.stack(rows)

    def kept_counts(self, prefix: Prefix, first: FirstStep | None, counts: tuple[int, ...]) -> Tensor:
        if first is None:
            raise UserError("AdaptiveK decides by the first denoising step: pass its FirstStep")
        candidates_B = uncertainty(first).exp()
        bounds = send(torch.tensor(self.candidates), candidates_B.device)
        level_B = (candidates_B[:, None] > bounds).sum(-1)
        count_BL = torch.tensor([[max(1, Share.of(level).down(n)) for level in self.levels] for n in counts])
        return send(count_BL, level_B.device).gather(1, level_B[:, None]).squeeze(1)


def uncertainty(first: FirstStep) -> Tensor:
    """Entropy [B] in nats of the least certain slot that was masked before the step; 0 where none was.

    What the step predicts for a fixed token is no part of the answer, and may be anything.
    """
    # One answer at a time: in float32 the logits of a batch take gigabytes.
    entropy_BA = torch.stack([torch.special.entr(row.float().softmax(-1)).sum(-1) for row in first.logits_BAW])
    return (entropy_BA * first.masked_BA).amax(-1)


def _rises(numbers: Sequence[float]) -> bool:
    finite = all(math.isfinite(x) for x in numbers)
    return bool(numbers) and finite and all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
