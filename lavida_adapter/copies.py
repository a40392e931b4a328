"""What the language model says about the masked copies of a training batch (docs/lavida.md, "Training objective").

Letters: B rows, L positions, C copies of all rows, P prompt positions, A answer positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lavida_adapter.prefix import Prefix
from lavida_adapter.prompt import IGNORE

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida


def states_of_copies(
    model: "Lavida", whole: Prefix, labels_BL: Tensor, masked_CL: Tensor, *, prefix_mask: bool
) -> Tensor:
    """States [C, L, D] of copies of spliced rows in which the masked positions hold the mask embedding.

    Without `prefix_mask` prompt and answer see each other, as in LaViDa's training; with it the prompt does not see the
    answer, as at decoding.
    """
    mask_D = model.lm.wte(torch.tensor(model.config.lm.mask_token_id, device=model.device))
    n = len(masked_CL) // len(labels_BL)
    embeds = torch.where(masked_CL[..., None], mask_D.to(whole.embeds_BPD.dtype), whole.embeds_BPD.repeat(n, 1, 1))
    if prefix_mask:
        return _states_behind_prefix(model, whole, labels_BL, embeds, n)
    mask = None if whole.padding is None else whole.mask_BP.repeat(n, 1)
    states: Tensor = model.lm(embeds, mask_BL=mask, visual_BL=model.visual(whole.visual_BP.repeat(n, 1)))
    return states


def _states_behind_prefix(model: "Lavida", whole: Prefix, labels_BL: Tensor, embeds: Tensor, n: int) -> Tensor:
    """One prefill per prompt, then all `n` copies of its answer decode against it."""
    b, length = labels_BL.shape
    device = labels_BL.device
    begin_B = (labels_BL != IGNORE).to(torch.int64).argmax(-1)
    length_B1 = whole.mask_BP.sum(-1, keepdim=True)
    p, a = int(begin_B.max()), int((length_B1[:, 0] - begin_B).max())
    prompt_BP = torch.arange(p, device=device) < begin_B[:, None]
    cache = model.prefill(Prefix(whole.embeds_BPD[:, :p], prompt_BP, whole.visual_BP[:, :p]))
    index_BA = begin_B[:, None] + torch.arange(a, device=device)
    real_CA = (index_BA < length_B1).repeat(n, 1)
    # Slots behind a shorter row's end read position 0, are masked, and write to a spare position that is cut off.
    read = index_BA.repeat(n, 1).masked_fill(~real_CA, 0)[..., None].expand(-1, -1, embeds.shape[-1])
    write = index_BA.repeat(n, 1).masked_fill(~real_CA, length)[..., None].expand_as(read)
    states_CAD = model.lm.decode(embeds.gather(1, read), cache.repeat(n), None if real_CA.all() else real_CA)
    return states_CAD.new_zeros(n * b, length + 1, embeds.shape[-1]).scatter(1, write, states_CAD)[:, :length]
