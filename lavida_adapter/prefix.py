"""The prefix: selected picture tokens replace the placeholder among the text embeddings.

docs/lavida.md, "Splicing". Rows of unequal length are padded on the right with zero vectors. Unlike in the reference,
the language model masks this padding.

Shape letters: B prompts, P prefix slots, T selected tokens, n picture tokens of a prompt, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavida_adapter.prompt import IGNORE, IMAGE
from shirg import Selection, Source, UserError


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
    n_matched: tuple[int, ...] = ()
    """How many tokens LaViDa itself would feed for each picture, newlines included: the budget "matched"."""
    counts: tuple[tuple[int, int], ...] | None = None
    """Tokens and picture tokens of each prompt, where they are known without asking the device, which takes a wait."""
    ids: tuple[str, ...] = ()
    """What the caller calls each prompt, for messages; () where they have no names."""

    def name_of(self, i: int) -> str:
        """Prompt number i, as messages call it."""
        return _name_of(self.ids, i)

    @cached_property
    def padding(self) -> Tensor | None:
        """The mask, or None when no row is padded: then attention is faster and equals a single prompt's."""
        return self.mask_BP if min(self.n_tokens) < self.mask_BP.shape[1] else None

    @cached_property
    def n_visual(self) -> tuple[int, ...]:
        """How many picture tokens each prompt has; counted on the device where `splice` did not say."""
        return tuple(self.visual_BP.sum(-1).tolist()) if self.counts is None else tuple(n for _, n in self.counts)

    @cached_property
    def n_tokens(self) -> tuple[int, ...]:
        """How many tokens each prompt has, without padding."""
        return tuple(self.mask_BP.sum(-1).tolist()) if self.counts is None else tuple(n for n, _ in self.counts)


def _name_of(ids: Sequence[str], i: int) -> str:
    return f"prompt {ids[i]!r}" if ids else f"prompt {i} of the batch"


def picture_block(selection: Selection, tokens_TD: Tensor, newline_D: Tensor) -> Tensor:
    """The picture tokens [n, D] of a prompt: projected tokens and newline vectors, without unused slots."""
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
    names: Sequence[str] = (),
) -> tuple[Prefix, Tensor]:
    """Rows of text ids with one placeholder each, and their picture blocks [n, D] -> a padded Prefix and labels [B, P].

    Raises:
        UserError: for a row that does not hold exactly one placeholder or is too long; the message has its name.
    """
    device = wte.weight.device
    ids, visual, targets = [], [], []
    for i, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        if (pictures := list(row).count(IMAGE)) != 1:
            raise UserError(f"{_name_of(names, i)} holds {pictures} pictures, expected exactly one")
        at, n = list(row).index(IMAGE), len(block)
        # Too long a picture block would push the question out of the context; cutting it off silently would hide that.
        if len(row) - 1 + n > max_length:
            raise UserError(
                f"{_name_of(names, i)} has {len(row) - 1 + n} tokens, {n} of them for the picture, more than the "
                f"model's {max_length}: lower the budget or shorten the text"
            )
        label = list(labels[i]) if labels is not None else [IGNORE] * len(row)
        ids.append(torch.tensor([*row[:at], *[0] * n, *row[at + 1 :]]))
        visual.append(torch.tensor([*[False] * at, *[True] * n, *[False] * (len(row) - at - 1)]))
        targets.append(torch.tensor([*label[:at], *[IGNORE] * n, *label[at + 1 :]]))
    counts = tuple((len(row), len(block)) for row, block in zip(ids, blocks, strict=True))
    ids_BP = pad_sequence(ids, batch_first=True).to(device, non_blocking=True)
    visual_BP = pad_sequence(visual, batch_first=True).to(device, non_blocking=True)
    mask_BP = (torch.arange(ids_BP.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]).to(
        device, non_blocking=True
    )
    embeds_BPD = wte(ids_BP) * mask_BP[..., None]
    embeds_BPD = embeds_BPD.masked_scatter(visual_BP[..., None], torch.cat(list(blocks)).to(embeds_BPD.dtype))
    targets_BP = pad_sequence(targets, batch_first=True, padding_value=IGNORE).to(device, non_blocking=True)
    return Prefix(embeds_BPD, mask_BP, visual_BP, counts=counts, ids=tuple(names)), targets_BP
