"""The loss of training examples: pictures and answers to rows, rows to masked copies, copies to cross entropy.

docs/lavida.md, "Training objective". Letters: B rows, L positions, C copies of all rows, M masked targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from lavida_adapter.auxiliary import adaptive_k_loss, alignment, row_losses
from lavida_adapter.copies import states_of_copies
from lavida_adapter.objective import (
    ObjectiveConfig,
    Tally,
    extra_padding,
    mask_probability,
    masked_cross_entropy,
    masked_targets,
    pad_answers,
    sample_times,
)
from lavida_adapter.pictures import Boxes, picture_blocks
from lavida_adapter.prefix import Prefix, splice
from lavida_adapter.prompt import IGNORE, training_example
from lavida_adapter.relevance import Relevance
from lavida_adapter.share import SINGLE, Shard
from lavida_adapter.timer import NoTimer
from lavida_adapter.views import Views
from shirg import Selector

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida


@dataclass(frozen=True)
class TrainBatch:
    """Examples to learn from; pictures that are the same object are encoded once."""

    images: Sequence[Image.Image | Views]
    """Pictures, or what `geometries.cut` made of them for the selector of the step."""
    questions: Sequence[str]
    answers: Sequence[str]
    ids: Sequence[str]
    prompts: Sequence[str] | None = None
    """The questions with the dataset's suffix; the questions themselves when None."""
    boxes: Sequence[Boxes] | None = None
    """Where each example's evidence is, as fractions of its picture; only an oracle looks."""
    histories: Sequence[Sequence[str]] | None = None
    """The turns before each question, the user's and the assistant's alternating."""


def batch_loss(
    model: "Lavida",
    batch: TrainBatch,
    selector: Selector,
    objective: ObjectiveConfig,
    generator: torch.Generator,
    *,
    relevance: Relevance | None,
    share: Shard,
    tally: Tally | None,
) -> Tensor:
    """What `Lavida.loss` says: the answers' loss, and what the objective adds to it."""
    timer, tally = NoTimer(), tally or Tally()
    blocks, selections = picture_blocks(
        model, batch.images, batch.questions, batch.ids, selector, relevance, timer, batch.boxes
    )
    prompts = batch.questions if batch.prompts is None else batch.prompts
    histories = [()] * len(prompts) if batch.histories is None else batch.histories
    examples = [
        training_example(model.tokenizer, prompt, answer, model.config, history=history)
        for prompt, answer, history in zip(prompts, batch.answers, histories, strict=True)
    ]
    rows, labels = pad_answers(
        [e.prompt for e in examples],
        [e.answer for e in examples],
        eos=model.config.lm.eos_token_id,
        extra=extra_padding(objective, generator),
        least=objective.answer_tokens or 0,
        agree=share.largest,
    )
    loss = rows_loss(model, rows, labels, blocks, objective, generator, share=share, tally=tally)
    if objective.alignment:
        tally.terms["alignment"] = alignment(model, batch, blocks, selections)
        loss = loss + objective.alignment * tally.terms["alignment"]
    if objective.adaptive_k and tally.row_loss_B is not None:
        tally.terms["adaptive_k"] = adaptive_k_loss(selections, tally.row_loss_B)
        loss = loss + objective.adaptive_k * tally.terms["adaptive_k"]
    return loss


def rows_loss(
    model: "Lavida",
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    blocks: Sequence[Tensor],
    objective: ObjectiveConfig,
    generator: torch.Generator,
    *,
    share: Shard = SINGLE,
    tally: Tally | None = None,
) -> Tensor:
    """The loss of token rows with one picture block each; what exceeds the model's context is cut off on the right.

    Raises:
        ValueError: for a row without a target: it would teach nothing.
    """
    max_length = model.config.tokenizer_model_max_length
    room = [max_length - len(block) + 1 for block in blocks]
    rows = [row[:n] for row, n in zip(rows, room, strict=True)]
    labels = [label[:n] for label, n in zip(labels, room, strict=True)]
    for i, label in enumerate(labels):
        if all(token == IGNORE for token in label):
            raise ValueError(f"training row {i} has no target token: its answer was empty or cut away")
    whole, labels_BL = splice(rows, blocks, model.lm.wte, max_length=max_length, labels=labels)
    b, length = labels_BL.shape
    whole_b, longest = b * share.world, share.largest(length)
    t_B = share.rows(sample_times(whole_b, objective.time, generator, model.device))
    u_BL = share.rows(torch.rand(whole_b, longest, generator=generator, device=model.device))
    if tally is not None:
        tally.tokens = sum(len(row) - 1 + len(block) for row, block in zip(rows, blocks, strict=True))
    return draw_loss(model, whole, labels_BL, t_B, u_BL, objective, share=share, tally=tally)


def draw_loss(
    model: "Lavida",
    whole: Prefix,
    labels_BL: Tensor,
    t_B: Tensor,
    u_BL: Tensor,
    objective: ObjectiveConfig,
    *,
    share: Shard = SINGLE,
    tally: Tally | None = None,
) -> Tensor:
    """The loss of spliced rows at noise levels `t_B`, with one uniform draw `u_BL` per position.

    Draws beyond a row's end count for its minimum alone.
    """
    target_BL = labels_BL != IGNORE
    masked_BL, complement_BL = masked_targets(target_BL, t_B, u_BL[:, : labels_BL.shape[1]], u_BL.amin(-1))
    copies = [masked_BL, complement_BL] if objective.complementary else [masked_BL]
    masked_CL = torch.cat(copies)
    states = states_of_copies(model, whole, labels_BL, masked_CL, prefix_mask=objective.prefix_mask)
    logits_MW, labels_M = model.lm.logits(states[masked_CL]), labels_BL.repeat(len(copies), 1)[masked_CL]
    if tally is not None:
        tally.masked, tally.right = len(labels_M), (logits_MW.detach().argmax(-1) == labels_M).sum()
        if objective.adaptive_k:
            row_M = masked_CL.nonzero()[:, 0] % len(labels_BL)
            tally.row_loss_B = row_losses(logits_MW, labels_M, row_M, len(labels_BL))
    if objective.weighting == "none":
        return masked_cross_entropy(logits_MW, labels_M, n_targets=max(1.0, share.mean(len(labels_M))))
    p_B = mask_probability(t_B)
    # Either copy alone estimates the same loss without bias: together they are averaged.
    weight_C = torch.cat([p_B, 1 - p_B][: len(copies)]).clamp_min(1e-3).reciprocal() / len(copies)
    weight_M = weight_C[:, None].expand_as(masked_CL)[masked_CL]
    return masked_cross_entropy(logits_MW, labels_M, weight_M, n_targets=share.mean(int(target_BL.sum())))
