"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764) on a prefix cache.

The paper ranks picture tokens by the attention that the last prompt token pays them in one early layer, and drops the
others from the later layers. Here the ranking is made after all layers have run, and the same rows are dropped from
every layer's cache: the prefill costs the same as without a selector, the denoising steps become cheaper
(docs/method.md, "fastv").
"""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lavida_adapter.cache_compression.compressor import CacheSelector, FirstStep, Positions
from lavida_adapter.cache_compression.prompt_rows import (
    check_depth,
    check_layer,
    last_slot,
    prompt_attention,
    text_slots,
)
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prefix import Prefix
from shirg import Budget, UserError

Queries = Literal["last", "text"]


class FastV(CacheSelector):
    """Ranks picture rows by the attention that they receive from the prompt's text in one layer, averaged over heads.

    `layer` counts from 0; the paper's "after layer 2" reads the map of layer 1. `queries`: "last" is the prompt's last
    token, as in the paper; "text" is the mean over all of its text, since LLaDA's attention is bidirectional and the
    last token is not special.
    """

    after: ClassVar[Literal["prefill", "first_step"]] = "prefill"

    def __init__(
        self, *, budget: Budget, layer: int = 1, queries: Queries = "last", positions: Positions = "retain"
    ) -> None:
        super().__init__(budget=budget, positions=positions)
        if queries not in get_args(Queries):
            raise UserError(f"queries={queries!r}: choose last or text")
        self.layer = check_layer(layer)
        self.queries: Queries = queries

    def score(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        check_depth(self.layer, lm)
        if self.queries == "last":
            slot_BQ = last_slot(prefix)
            weight_BQ = torch.ones_like(slot_BQ, dtype=torch.float32)
        else:
            slot_BQ, real_BQ = text_slots(prefix, prefix.mask_BP & ~prefix.visual_BP)
            weight_BQ = real_BQ.float()
        rows_BQP = prompt_attention(lm, cache, prefix.embeds_BPD, slot_BQ, self.layer)
        return (rows_BQP * weight_BQ[..., None]).sum(1) / weight_BQ.sum(1, keepdim=True)
