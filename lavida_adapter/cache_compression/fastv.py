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
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.llada import Llada, attention_weights, rotary_angles
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
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise UserError(f"layer={layer!r}: give the number of a layer, counted from 0")
        if queries not in get_args(Queries):
            raise UserError(f"queries={queries!r}: choose last or text")
        self.layer = layer
        self.queries: Queries = queries

    def score(self, lm: Llada, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        if self.layer >= len(lm.layers):
            raise UserError(f"layer={self.layer}: the language model has layers 0 to {len(lm.layers) - 1}")
        text_BP = prefix.mask_BP & ~prefix.visual_BP
        if self.queries == "last":
            slots = torch.arange(text_BP.shape[1], device=text_BP.device)
            slot_BQ = (slots * text_BP).amax(-1, keepdim=True)
            weight_BQ = torch.ones_like(slot_BQ, dtype=torch.float32)
        else:
            n = max(total - visual for total, visual in zip(prefix.n_tokens, prefix.n_visual, strict=True))
            slot_BQ = torch.sort(~text_BP, dim=-1, stable=True).indices[:, :n]
            weight_BQ = text_BP.gather(1, slot_BQ).float()
        rows_BQP = prompt_attention(lm, cache, prefix.embeds_BPD, slot_BQ, self.layer)
        return (rows_BQP * weight_BQ[..., None]).sum(1) / weight_BQ.sum(1, keepdim=True)


def prompt_attention(lm: Llada, cache: PrefixCache, embeds_BPD: Tensor, slot_BQ: Tensor, layer: int) -> Tensor:
    """The attention [B, Q, P] of the slots `slot_BQ` in one layer, averaged over heads, in float32.

    Only these rows run again, up to that layer, against the cached keys and values: the cost is that of Q tokens, and
    no [P, P] map is built.
    """
    x = embeds_BPD.gather(1, slot_BQ[..., None].expand(-1, -1, embeds_BPD.shape[-1]))
    positions_BQ = cache.positions_BP.gather(1, slot_BQ)
    cos, sin = rotary_angles(positions_BQ, lm.config.head_dim, lm.config.rope_theta)
    mask = None if cache.mask_BP is None else cache.mask_BP[:, None, None, :]
    for block, k, v in zip(lm.layers[:layer], cache.keys, cache.values, strict=False):
        x = block.output(x, block.attn_norm(x), k, v, cos, sin, mask, lm.backend)
    block = lm.layers[layer]
    return attention_weights(block.queries(block.attn_norm(x), cos, sin), cache.keys[layer], mask).mean(1)
