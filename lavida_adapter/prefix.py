"""The prefix: selected picture tokens replace the placeholder among the text embeddings.

docs/lavida.md, "Splicing". Rows of unequal length are padded on the right with zero vectors. Unlike in the reference,
the language model masks this padding.

A prefix from `splice` knows the lengths of its prompts on the host: to ask a GPU for them, the host would have to wait.

Shape letters: B prompts, P prefix slots, T selected tokens, n picture tokens of a prompt, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavida_adapter.prompt import IGNORE, IMAGE
from shirg import Selection, Source, UserError, gather_tokens, send


@dataclass(frozen=True)
class PromptCounts:
    """How many tokens a prompt has."""

    tokens: int
    """All, without padding."""
    visual: int
    """Of the picture, newlines included."""
    behind: int
    """Of the text behind the picture, which holds the question."""


@dataclass(frozen=True)
class Prefix:
    """B prompts as embeddings, ready for the prefix cache."""

    embeds_BPD: Tensor
    mask_BP: Tensor
    """bool: False in padding, which is behind the tokens of each prompt."""
    visual_BP: Tensor
    """bool: True at picture tokens, newlines included."""
    selections: tuple[Selection, ...] = ()
    """One per prompt, each with B = 1."""
    n_matched: tuple[int, ...] = ()
    """How many tokens LaViDa itself would feed for each picture, newlines included: the budget "matched"."""
    given_counts: tuple[PromptCounts, ...] | None = None
    """The counts of each prompt, where whoever made the prefix knows them."""
    ids: tuple[str, ...] = ()
    """What the caller calls each prompt, for messages; () where they have no names."""

    def name_of(self, i: int) -> str:
        """Prompt number i, as messages call it."""
        return _name_of(self.ids, i)

    @cached_property
    def padding(self) -> Tensor | None:
        """The mask, or None when no row is padded: then attention is faster and equals a single prompt's."""
        return self.mask_BP if min(self.n_tokens) < self.mask_BP.shape[1] else None

    @property
    def behind_BP(self) -> Tensor:
        """bool: the text behind the picture, which holds the question."""
        seen_BP = self.visual_BP.cumsum(-1) == self.visual_BP.sum(-1, keepdim=True)
        return self.mask_BP & ~self.visual_BP & seen_BP

    @cached_property
    def counts(self) -> tuple[PromptCounts, ...]:
        """The counts of each prompt, asked of the device where they are not given.

        Raises:
            UserError: for padding before a token.
        """
        if self.given_counts is not None:
            return self.given_counts
        if bool((self.mask_BP.diff(dim=-1) & ~self.mask_BP[:, :-1]).any()):
            raise UserError("a prefix has padding before a token (mask_BP): pad prompts at their end")
        counts_B3 = torch.stack([x.sum(-1) for x in (self.mask_BP, self.visual_BP, self.behind_BP)], dim=-1)
        return tuple(PromptCounts(*row) for row in counts_B3.tolist())

    @property
    def n_visual(self) -> tuple[int, ...]:
        """How many picture tokens each prompt has."""
        return tuple(count.visual for count in self.counts)

    @property
    def n_tokens(self) -> tuple[int, ...]:
        """How many tokens each prompt has, without padding."""
        return tuple(count.tokens for count in self.counts)

    @property
    def n_behind(self) -> tuple[int, ...]:
        """How many text tokens each prompt has behind the picture."""
        return tuple(count.behind for count in self.counts)


def _name_of(ids: Sequence[str], i: int) -> str:
    return f"prompt {ids[i]!r}" if ids else f"prompt {i} of the batch"


def used_first(mask_BT: Tensor) -> Tensor:
    """int64 [B, T]: the used slots of each row in order, then the others. A bool mask as an index would need a wait."""
    return torch.sort(~mask_BT, dim=-1, stable=True).indices


def picture_rows(selection: Selection, tokens_BTD: Tensor, newline_D: Tensor) -> Tensor:
    """The picture tokens [B, T, D] of each prompt: projected tokens and newline vectors, unused slots at the end."""
    is_newline_BT1 = (selection.source_BT == Source.NEWLINE)[..., None]
    rows_BTD = torch.where(is_newline_BT1, newline_D.to(tokens_BTD.dtype), tokens_BTD)
    return gather_tokens(rows_BTD, used_first(selection.mask_BT))


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
    ids, visual, targets, counts = [], [], [], []
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
        counts.append(PromptCounts(len(row) - 1 + n, n, len(row) - at - 1))
    ids_BP = send(pad_sequence(ids, batch_first=True), device)
    visual_BP = send(pad_sequence(visual, batch_first=True), device)
    mask_BP = send(torch.arange(ids_BP.shape[1]) < torch.tensor([len(row) for row in ids])[:, None], device)
    embeds_BPD = wte(ids_BP) * mask_BP[..., None]
    embeds_BPD = embeds_BPD.masked_scatter(visual_BP[..., None], torch.cat(list(blocks)).to(embeds_BPD.dtype))
    targets_BP = send(pad_sequence(targets, batch_first=True, padding_value=IGNORE), device)
    return Prefix(embeds_BPD, mask_BP, visual_BP, given_counts=tuple(counts), ids=tuple(names)), targets_BP
