"""RedVTP (Xu et al., CVPR 2026 Findings, arXiv 2511.12428) on a prefix cache.

The paper prunes once, after the first denoising step, by the attention that picture tokens receive from the answer
tokens that are still masked; it reports that the ranking hardly changes in later steps. Its code has no prefix cache,
so its later steps recompute the prompt without the pruned tokens. Here the prompt is cached, and the rows are removed
from the cache (docs/method.md, "redvtp").
"""

from typing import ClassVar, Literal

from torch import Tensor

from lavida_adapter.cache_compression.compressor import CacheSelector, FirstStep, Positions
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prefix import Prefix
from shirg import Budget, UserError


class RedVTP(CacheSelector):
    """Ranks picture rows by the first step's attention from still-masked answer tokens, over all layers and heads.

    If the first step completes an answer, all scores are 0 and its first rows stay; no later step reads them.
    """

    after: ClassVar[Literal["prefill", "first_step"]] = "first_step"

    def __init__(self, *, budget: Budget, positions: Positions = "reindex") -> None:
        super().__init__(budget=budget, positions=positions)

    def score(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        if first is None:
            raise UserError("RedVTP ranks by the first denoising step: pass its FirstStep")
        open_BA = first.open_BA.float()
        return (first.attention_BAP * open_BA[..., None]).sum(1) / open_BA.sum(1, keepdim=True).clamp_min(1)
