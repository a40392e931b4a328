"""Losses beside the answer's, both off by default (docs/method.md, "Losses beside the answer's").

Letters: B prompts, D width, M masked targets, W words.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.prompt import encode_text
from shirg import Selection, Source

if TYPE_CHECKING:
    from lavida_adapter.loss import TrainBatch
    from lavida_adapter.model import Lavida

TEMPERATURE = 0.07
"""Of the contrast between pictures and questions, as in CLIP at its start (arXiv 2103.00020)."""


def alignment_loss(picture_BD: Tensor, question_BD: Tensor, same_BB: Tensor, temperature: float) -> Tensor:
    """InfoNCE between pictures and questions, both ways, float32; pairs in `same_BB` off the diagonal do not count."""
    z_BB = F.normalize(picture_BD.float(), dim=-1) @ F.normalize(question_BD.float(), dim=-1).T / temperature
    own_B = torch.arange(len(z_BB), device=z_BB.device)
    z_BB = z_BB.masked_fill(same_BB & ~torch.eye(len(z_BB), dtype=torch.bool, device=z_BB.device), float("-inf"))
    return (F.cross_entropy(z_BB, own_B) + F.cross_entropy(z_BB.T, own_B)) / 2


def alignment(
    model: "Lavida", batch: "TrainBatch", blocks: Sequence[Tensor], selections: Sequence[Selection]
) -> Tensor:
    """`alignment_loss` of a batch: the mean of each prompt's projected picture tokens against that of its question.

    Newlines do not count; prompts that share their picture or their question are not told apart.

    Raises:
        ValueError: when no two prompts can be told apart, or a question has no token.
    """
    pictures, questions = [], []
    for i, (block, selection) in enumerate(zip(blocks, selections, strict=True)):
        is_token = selection.source_BT[0][selection.mask_BT[0]] != int(Source.NEWLINE)
        pictures.append(block[is_token].mean(0))
        ids = encode_text(model.tokenizer, batch.questions[i].strip())
        if not ids:
            raise ValueError(f"objective.alignment: the question of sample {batch.ids[i]!r} has no token")
        questions.append(model.lm.wte(torch.tensor(ids, device=model.device)).mean(0))
    n = range(len(pictures))
    same = [
        [batch.images[i] is batch.images[j] or batch.questions[i].strip() == batch.questions[j].strip() for j in n]
        for i in n
    ]
    if all(all(row) for row in same):
        raise ValueError(
            "objective.alignment contrasts the prompts of a batch, and this one has no two with other pictures and "
            "other questions: raise batch_size"
        )
    same_BB = torch.tensor(same, device=model.device)
    return alignment_loss(torch.stack(pictures), torch.stack(questions), same_BB, TEMPERATURE)


def row_losses(logits_MW: Tensor, labels_M: Tensor, row_M: Tensor, b: int) -> Tensor:
    """The mean cross entropy of each of b rows, float32 without a graph; NaN for a row without masked targets."""
    with torch.no_grad():
        loss_M = F.cross_entropy(logits_MW.float(), labels_M, reduction="none")
        total_B = loss_M.new_zeros(b).index_add(0, row_M, loss_M)
        return total_B / loss_M.new_zeros(b).index_add(0, row_M, torch.ones_like(loss_M))


def adaptive_k_loss(selections: Sequence[Selection], row_loss_B: Tensor) -> Tensor:
    """Mean squared error of what the selector's head expected of each row, over the rows that have a loss.

    Raises:
        ValueError: for a selector without a head.
    """
    expected = [selection.expected_B for selection in selections if selection.expected_B is not None]
    if len(expected) < len(selections):
        raise ValueError("objective.adaptive_k trains the head of a selector: choose selector.adaptive.mode=head")
    expected_B, seen_B = torch.cat(expected), row_loss_B.isfinite()
    # Replaced before the difference: a NaN that is masked afterwards would still be in the gradient.
    error_B = (expected_B - torch.where(seen_B, row_loss_B, expected_B.detach())).square()
    return error_B.sum() / seen_B.sum().clamp_min(1)
