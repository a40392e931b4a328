"""Single rows of the prefill, computed again for the methods that rank by them.

A cache holds keys and values, but neither queries nor states. What a method needs of those is computed from the
prompt's embeddings against the cached keys and values, so that the prefill itself has nothing to record.

Shape letters: B batch, P prefix slots, Q slots that run again, D width.
"""

import torch
from torch import Tensor

from lavida_adapter.attention import attention_mask, attention_weights
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prefix import Prefix
from shirg import UserError


def prompt_attention(lm: LanguageModel, cache: PrefixCache, embeds_BPD: Tensor, slot_BQ: Tensor, layer: int) -> Tensor:
    """The attention [B, Q, P] of the text slots `slot_BQ` in one layer, averaged over heads, in float32.

    Only these rows run again, up to that layer: the cost is that of Q tokens, and no [P, P] map is built.
    """
    x = gather_rows(embeds_BPD, slot_BQ)
    cos, sin = lm.angles(cache.positions_BP.gather(1, slot_BQ))
    mask = attention_mask(cache.mask_BP, None)
    for block, k, v in zip(lm.layers[:layer], cache.keys, cache.values, strict=False):
        x = block.output(x, block.attention_norm(x), k, v, cos, sin, mask, lm.backend)
    block = lm.layers[layer]
    return attention_weights(block.queries(block.attention_norm(x), cos, sin), cache.keys[layer], mask).mean(1)


def prompt_states(lm: LanguageModel, cache: PrefixCache, embeds_BPD: Tensor, layer: int) -> Tensor:
    """The states [B, P, D] of the whole prompt at the input of one layer.

    It costs `layer` layers of a prefill, except for their keys and values.
    """
    x = embeds_BPD
    cos, sin = lm.angles(cache.positions_BP)
    mask = attention_mask(cache.mask_BP, cache.visual_BP)
    for block, k, v in zip(lm.layers[:layer], cache.keys, cache.values, strict=False):
        x = block.output(x, block.attention_norm(x), k, v, cos, sin, mask, lm.backend)
    return x


def text_slots(prefix: Prefix, text_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The slots [B, Q] of the text in `text_BP`, in reading order, and which of them are real; Q has room for all text.

    `text_BP`: bool, any part of the prompt's text.
    """
    n = max(total - visual for total, visual in zip(prefix.n_tokens, prefix.n_visual, strict=True))
    slot_BQ = torch.sort(~text_BP, dim=-1, stable=True).indices[:, :n]
    return slot_BQ, text_BP.gather(1, slot_BQ)


def text_behind(prefix: Prefix, name: str) -> Tensor:
    """bool [B, P]: the text behind the picture, which holds the question. `name`: of the method that asks.

    Raises:
        UserError: when a prompt has none.
    """
    for i, n in enumerate(prefix.n_behind):
        if not n:
            raise UserError(
                f"{name} ranks by the text behind the picture, and {prefix.name_of(i)} has none: put the question "
                "there, or choose another cache="
            )
    return prefix.behind_BP


def last_slot(prefix: Prefix) -> Tensor:
    """The slot [B, 1] of each prompt's last text token."""
    text_BP = prefix.mask_BP & ~prefix.visual_BP
    return (torch.arange(text_BP.shape[1], device=text_BP.device) * text_BP).amax(-1, keepdim=True)


def gather_rows(x_BPD: Tensor, slot_BQ: Tensor) -> Tensor:
    """The rows [B, Q, D] of the given slots."""
    return x_BPD.gather(1, slot_BQ[..., None].expand(-1, -1, x_BPD.shape[-1]))


def check_layer(layer: int, first: int = 0) -> int:
    """The number of a layer, as an option gives it; UserError unless it is a whole number from `first` on."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < first:
        least = "" if first == 0 else f", {first} or more"
        raise UserError(f"layer={layer!r}: give the number of a layer, counted from 0{least}")
    return layer


def check_depth(layer: int, lm: LanguageModel) -> None:
    """Raises UserError when the model has no such layer."""
    if layer >= len(lm.layers):
        raise UserError(f"layer={layer}: the language model has layers 0 to {len(lm.layers) - 1}")
