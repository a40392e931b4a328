"""How far a smaller prefix cache moves the model: its first logits against those of the cache as it was written."""

from dataclasses import dataclass

import torch

from lavida_adapter.cache import PrefixCache, StoredPrefix
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.llada import Llada


@dataclass(frozen=True)
class Drift:
    """For each prompt of a batch, over all slots of an answer that is still masked."""

    most: tuple[float, ...]
    """Largest |difference| of a logit."""
    same_top1: tuple[float, ...]
    """Share of slots whose likeliest token is the same; the mask token does not compete."""


@torch.inference_mode()
def drift(lm: Llada, whole: PrefixCache, stored: StoredPrefix, n_answer: int) -> Drift:
    """How far the logits of a first step over `stored` are from those over `whole`, for answers of `n_answer` masks.

    The mask token, which is never an answer, counts for nothing.
    """
    mask_id = lm.config.mask_token_id
    ids_BA = torch.full((len(whole.next_position_B), n_answer), mask_id, device=whole.next_position_B.device)
    expected, found = (DecodeSteps(lm, cache, n_answer)(ids_BA).float() for cache in (whole, stored))
    for logits in (expected, found):
        logits[..., mask_id] = 0.0
    most_B = (expected - found).abs().amax(dim=(1, 2))
    for logits in (expected, found):
        logits[..., mask_id] = float("-inf")
    same_B = (expected.argmax(-1) == found.argmax(-1)).float().mean(-1)
    return Drift(tuple(most_B.tolist()), tuple(same_B.tolist()))
