"""The prefix: selected picture tokens take the placeholder's place among the text embeddings.

docs/lavida.md, "Splicing". Rows of unequal length are padded on the right with zero vectors; the mask says so, and
unlike the reference the network obeys it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavida_adapter.prompt import IGNORE, IMAGE
from shirg import Selection, Source


@dataclass(frozen=True)
class Prefix:
    """B prompts as embeddings, ready for the prefix cache."""

    embeds_BPD: Tensor
    mask_BP: Tensor
    """bool: False in padding."""
    visual_BP: Tensor
    """bool: True at picture tokens, newlines included."""
    selections: tuple[Selection, ...] = ()
    """One per prompt, each with B = 1."""

    @property
    def padding(self) -> Tensor | None:
        """The mask, or None when no row is padded: attention is faster, and bit-equal to a single prompt, without one."""
        return None if bool(self.mask_BP.all()) else self.mask_BP

    @property
    def n_visual(self) -> tuple[int, ...]:
        return tuple(self.visual_BP.sum(-1).tolist())

    @property
    def n_tokens(self) -> tuple[int, ...]:
        return tuple(self.mask_BP.sum(-1).tolist())


def picture_block(selection: Selection, tokens_TD: Tensor, newline_D: Tensor) -> Tensor:
    """The picture's tokens [n, D] of one prompt: projected tokens, newline vectors in their slots, unused slots gone."""
    is_newline_T1 = (selection.source_BT[0] == Source.NEWLINE)[:, None]
    block_TD = torch.where(is_newline_T1, newline_D.to(tokens_TD.dtype), tokens_TD)
    return block_TD[selection.mask_BT[0]]


def splice(
    rows: Sequence[Sequence[int]],
    blocks: Sequence[Tensor],
    wte: nn.Embedding,
    *,
    max_length: int,
    labels: Sequence[Sequence[int]] | None = None,
) -> tuple[Prefix, Tensor]:
    """Text ids with one placeholder each, and their picture blocks [n, D], to a padded Prefix and its labels [B, P].

    Raises:
        ValueError: for a row that does not hold exactly one placeholder.
    """
    device = wte.weight.device
    embeds, visuals, targets = [], [], []
    for i, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        if list(row).count(IMAGE) != 1:
            raise ValueError(f"prompt {i} holds {list(row).count(IMAGE)} pictures, expected exactly one")
        at, n = list(row).index(IMAGE), len(block)
        # A picture block longer than the model's context leaves no room for the question: cutting it would hide that.
        if len(row) - 1 + n > max_length:
            raise ValueError(
                f"prompt {i} has {len(row) - 1 + n} tokens, {n} of them for the picture, more than the model's "
                f"{max_length}: lower the budget or shorten the text"
            )
        before, after = (torch.tensor(list(ids), dtype=torch.int64, device=device) for ids in (row[:at], row[at + 1 :]))
        embeds.append(torch.cat([wte(before), block.to(wte.weight.dtype), wte(after)]))
        visuals.append(torch.arange(len(embeds[-1]), device=device).sub(at).ge(0).logical_and(
            torch.arange(len(embeds[-1]), device=device) < at + n
        ))
        label = list(labels[i]) if labels is not None else [IGNORE] * len(row)
        targets.append(torch.tensor(label[:at] + [IGNORE] * n + label[at + 1 :], dtype=torch.int64, device=device))
    embeds_BPD = pad_sequence(embeds, batch_first=True)
    length_B1 = torch.tensor([len(e) for e in embeds], device=device)[:, None]
    prefix = Prefix(
        embeds_BPD=embeds_BPD,
        mask_BP=torch.arange(embeds_BPD.shape[1], device=device) < length_B1,
        visual_BP=pad_sequence(visuals, batch_first=True),
    )
    return prefix, pad_sequence(targets, batch_first=True, padding_value=IGNORE)
