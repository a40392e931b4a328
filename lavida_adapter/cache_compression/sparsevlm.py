"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417) on a prefix cache.

The paper first chooses the text tokens that the picture is related to, the raters, and then ranks picture tokens by the
attention that the raters pay them. It prunes in three stages while the prompt is computed and recycles some of what it
pruned. Here the prompt has been computed already, so rows are cut once, by the ranking of one layer, and none is
recycled (docs/method.md, "sparsevlm").

Shape letters: B batch, P prefix slots, Q text slots.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lavida_adapter.cache_compression.compressor import CacheSelector, FirstStep, Positions
from lavida_adapter.cache_compression.prompt_rows import (
    check_depth,
    check_layer,
    gather_rows,
    prompt_attention,
    text_behind,
    text_slots,
)
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prefix import Prefix
from shirg import Budget


class SparseVLM(CacheSelector):
    """Ranks picture rows by the attention of the raters in one layer, averaged over heads and raters (Section 3.2).

    `layer` counts from 0; the paper's code prunes behind the layers 2, 6 and 15.
    """

    after: ClassVar[Literal["prefill", "first_step"]] = "prefill"

    def __init__(self, *, budget: Budget, layer: int = 2, positions: Positions = "reindex") -> None:
        super().__init__(budget=budget, positions=positions)
        self.layer = check_layer(layer)

    def score(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        check_depth(self.layer, lm)
        slot_BQ, real_BQ = text_slots(prefix, text_behind(prefix, type(self).__name__))
        weight_BQ1 = raters(prefix, slot_BQ, real_BQ).float()[..., None]
        rows_BQP = prompt_attention(lm, cache, prefix.embeds_BPD, slot_BQ, self.layer)
        return (rows_BQP * weight_BQ1).sum(1) / weight_BQ1.sum(1)


def raters(prefix: Prefix, slot_BQ: Tensor, real_BQ: Tensor) -> Tensor:
    """bool [B, Q]: which of the text slots are related to the picture more than the average text slot is.

    Each picture token spreads a weight of 1 over the text by a softmax of the products of the embeddings, as they enter
    the language model. A text token's relation is its mean weight. If all relations are equal, all text tokens rate.
    """
    embeds_BPD = prefix.embeds_BPD.float()
    product_BPQ = embeds_BPD @ gather_rows(embeds_BPD, slot_BQ).transpose(1, 2)
    weight_BPQ = product_BPQ.masked_fill(~real_BQ[:, None], float("-inf")).softmax(-1)
    relation_BQ = (weight_BPQ * prefix.visual_BP[..., None]).sum(1) / prefix.visual_BP.sum(-1, keepdim=True)
    above_BQ = (relation_BQ > relation_BQ.sum(-1, keepdim=True) / real_BQ.sum(-1, keepdim=True)) & real_BQ
    return torch.where(above_BQ.any(-1, keepdim=True), above_BQ, real_BQ)
