"""The training loss of a batch: masked cross entropy, complementary masks, auxiliary losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavida_adapter.encode import Boxes, PictureEncoder, PicturePrompts
from lavida_adapter.modules import LavidaModules
from lavida_adapter.objective import (
    SINGLE,
    ObjectiveConfig,
    Shard,
    Tally,
    extra_padding,
    mask_probability,
    masked_cross_entropy,
    masked_targets,
    pad_answers,
    sample_times,
)
from lavida_adapter.prefix import Prefix, splice, used_first
from lavida_adapter.prompt import IGNORE, Example, encode_text, training_example
from lavida_adapter.relevance import Relevance
from lavida_adapter.timing import NoTimer
from lavida_adapter.views import Views, content_key
from lavida_adapter.vision import in_own_dtype
from shirg import Selection, Selector, Source, UserError, send


def states_of_copies(
    model: LavidaModules, whole: Prefix, labels_BL: Tensor, masked_CL: Tensor, *, prefix_mask: bool
) -> Tensor:
    """States [C, L, D] of masked copies of spliced rows: masked positions hold the embedding of the mask token.

    Without `prefix_mask` prompt and answer see each other, as in LaViDa's training. With it the prompt does not see the
    answer, as in decoding.
    """
    mask_D = model.lm.embedding(torch.full((), model.config.lm.mask_token_id, device=model.device))
    n = len(masked_CL) // len(labels_BL)
    embeds = torch.where(masked_CL[..., None], mask_D.to(whole.embeds_BPD.dtype), whole.embeds_BPD.repeat(n, 1, 1))
    if prefix_mask:
        return _states_behind_prefix(model, whole, labels_BL, embeds, n)
    mask = None if whole.padding is None else whole.mask_BP.repeat(n, 1)
    states: Tensor = model.lm(embeds, mask_BL=mask, visual_BL=model.visual(whole.visual_BP.repeat(n, 1)))
    return states


def _states_behind_prefix(model: LavidaModules, whole: Prefix, labels_BL: Tensor, embeds: Tensor, n: int) -> Tensor:
    """One prefill per prompt, then all `n` copies of its answer decode against that cache."""
    b, length = labels_BL.shape
    device = labels_BL.device
    begin_B = (labels_BL != IGNORE).to(torch.int64).argmax(-1)
    length_B1 = whole.mask_BP.sum(-1, keepdim=True)
    begins: list[int] = begin_B.tolist()
    answers = [n - begin for n, begin in zip(whole.n_tokens, begins, strict=True)]
    p, a = max(begins), max(answers)
    prompt_BP = None if min(begins) == p else torch.arange(p, device=device) < begin_B[:, None]
    cache = model.lm.prefill(whole.embeds_BPD[:, :p], prompt_BP, model.visual(whole.visual_BP[:, :p]))
    index_BA = begin_B[:, None] + torch.arange(a, device=device)
    real_CA = (index_BA < length_B1).repeat(n, 1)
    # Slots behind the end of a shorter row read position 0, are masked, and write to an extra position, cut off below.
    read = index_BA.repeat(n, 1).masked_fill(~real_CA, 0)[..., None].expand(-1, -1, embeds.shape[-1])
    write = index_BA.repeat(n, 1).masked_fill(~real_CA, length)[..., None].expand_as(read)
    states_CAD = model.lm.decode(embeds.gather(1, read), cache.repeat(n), None if min(answers) == a else real_CA)
    states_CLD = states_CAD.new_zeros(n * b, length + 1, embeds.shape[-1]).scatter(1, write, states_CAD)
    if cache.last_BD is not None:
        before_C11 = (begin_B - 1).repeat(n)[:, None, None]
        last_C1D = cache.last_BD.repeat(n, 1)[:, None]
        states_CLD = states_CLD.scatter(1, before_C11.expand_as(last_C1D), last_C1D)
    return states_CLD[:, :length]


TEMPERATURE = 0.07
"""Temperature of the alignment loss: the initial value of CLIP (arXiv 2103.00020)."""


def alignment_loss(picture_BD: Tensor, question_BD: Tensor, same_BB: Tensor, temperature: float) -> Tensor:
    """InfoNCE between pictures and questions in both directions, float32. `same_BB`: pairs that are no negatives."""
    with in_own_dtype(picture_BD.device):
        z_BB = F.normalize(picture_BD.float(), dim=-1) @ F.normalize(question_BD.float(), dim=-1).T / temperature
    own_B = torch.arange(len(z_BB), device=z_BB.device)
    z_BB = z_BB.masked_fill(same_BB & ~torch.eye(len(z_BB), dtype=torch.bool, device=z_BB.device), float("-inf"))
    return (F.cross_entropy(z_BB, own_B) + F.cross_entropy(z_BB.T, own_B)) / 2


def alignment(
    model: LavidaModules,
    batch: "TrainBatch",
    blocks: Sequence[Tensor],
    selections: Sequence[Selection],
    shard: Shard,
) -> Tensor:
    """`alignment_loss` between the mean projected picture token of each prompt and the mean embedding of its question.

    It contrasts all prompts of the global batch, and is the same in all processes. Newlines are left out. Prompts that
    share what their pictures show or their question are not negatives of each other.

    Raises:
        UserError: when the batch has no negatives, or a question has no token.
    """
    pictures, questions = [], []
    for i, (block, selection) in enumerate(zip(blocks, selections, strict=True)):
        source_n = selection.source_BT.gather(1, used_first(selection.mask_BT))[0, : len(block)]
        is_token_n1 = (source_n != int(Source.NEWLINE))[:, None]
        pictures.append((block * is_token_n1).sum(0) / is_token_n1.sum())
        ids = encode_text(model.tokenizer, batch.questions[i].strip())
        if not ids:
            raise UserError(f"objective.alignment: the question of sample {batch.ids[i]!r} has no token")
        questions.append(model.lm.embedding(send(torch.tensor(ids), model.device)).mean(0))
    # By content: an object is the same picture in one process only.
    keys = {id(image): content_key(image) for image in batch.images}
    shown = shard.gather([(keys[id(image)], q.strip()) for image, q in zip(batch.images, batch.questions, strict=True)])
    same = [[picture == p or question == q for p, q in shown] for picture, question in shown]
    if all(all(row) for row in same):
        raise UserError(
            "objective.alignment contrasts the prompts of a batch, and all prompts of this batch have one picture or "
            "question: raise batch_size"
        )
    same_BB = send(torch.tensor(same), model.device)
    picture_BD, question_BD = shard.gather_vectors(
        torch.stack([torch.stack(pictures), torch.stack(questions)], dim=1)
    ).unbind(1)
    return alignment_loss(picture_BD, question_BD, same_BB, TEMPERATURE)


def row_losses(logits_MW: Tensor, labels_M: Tensor, row_M: Tensor, b: int) -> Tensor:
    """Mean cross entropy [b] of each row, float32, without gradients; NaN for a row without masked targets."""
    with torch.no_grad():
        loss_M = F.cross_entropy(logits_MW.float(), labels_M, reduction="none")
        total_B = loss_M.new_zeros(b).index_add(0, row_M, loss_M)
        return total_B / loss_M.new_zeros(b).index_add(0, row_M, torch.ones_like(loss_M))


def answer_losses(
    model: LavidaModules, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], blocks: Sequence[Tensor]
) -> Tensor:
    """Cross entropy [B] of each row's whole answer, summed over its tokens, all of them masked; float32.

    That is minus the log probability of the answer in the first denoising step, over a prefix that does not see it.
    """
    most = model.config.tokenizer_model_max_length
    whole, labels_BL = splice(rows, blocks, model.lm.embedding, max_length=most, labels=labels)
    target_BL = labels_BL != IGNORE
    states = states_of_copies(model, whole, labels_BL, target_BL, prefix_mask=True)
    at_M = target_BL.flatten().nonzero()[:, 0]
    logits_MW = model.lm.logits(states.flatten(0, 1).index_select(0, at_M - model.lm.shift))
    loss_M = F.cross_entropy(logits_MW.float(), labels_BL.flatten()[at_M], reduction="none")
    return loss_M.new_zeros(len(labels_BL)).index_add(0, at_M // labels_BL.shape[1], loss_M)


def adaptive_k_loss(selections: Sequence[Selection], row_loss_B: Tensor, shard: Shard = SINGLE) -> Tensor:
    """Mean squared error of the loss that the selector's head predicts, over the rows with masked targets.

    It is divided by the mean number of such rows in a process, so that its mean over the processes is that of all rows.

    Raises:
        UserError: for a selector without such a head.
    """
    expected = [selection.expected_B for selection in selections if selection.expected_B is not None]
    if len(expected) < len(selections):
        raise UserError("objective.adaptive_k trains the head of a selector: choose selector.adaptive.mode=head")
    expected_B, seen_B = torch.cat(expected), row_loss_B.isfinite()
    # NaN is replaced before the difference: masked afterwards, it would still reach the gradient.
    error_B = (expected_B - torch.where(seen_B, row_loss_B, expected_B.detach())).square()
    if shard.world == 1:
        return error_B.sum() / seen_B.sum().clamp_min(1)  # without a wait for the device
    return error_B.sum() / (shard.mean(int(seen_B.sum())) or 1.0)


@dataclass(frozen=True)
class TrainBatch:
    """Training examples; images that are the same object are encoded once."""

    images: Sequence[Image.Image | Views]
    """Pictures, or the views that `lavida_adapter.views.cut` made of them for the selector of the step."""
    questions: Sequence[str]
    answers: Sequence[str]
    ids: Sequence[str]
    prompts: Sequence[str] | None = None
    """The questions with the dataset's suffix; None: the questions themselves."""
    boxes: Sequence[Boxes] | None = None
    """Where each example's evidence is, as fractions of its picture; only an oracle selector reads it."""
    histories: Sequence[Sequence[str]] | None = None
    """The turns before each question, the user's and the assistant's alternating."""


def rows_of(
    model: LavidaModules, batch: TrainBatch, *, extra: int, least: int, agree: Callable[[int], int] = int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token rows of prompts and answers, and their labels; see `pad_answers`."""
    examples = _examples(model, batch)
    return pad_answers(
        [e.prompt for e in examples],
        [e.answer for e in examples],
        eos=model.config.lm.eos_token_id,
        extra=extra,
        least=least,
        agree=agree,
    )


def rows_alone(model: LavidaModules, batch: TrainBatch, *, least: int) -> tuple[list[list[int]], list[list[int]]]:
    """As `rows_of`, but each row is padded for itself, to an answer of `least` tokens.

    The loss of a whole answer then does not depend on the other rows of the batch.
    """
    eos = model.config.lm.eos_token_id
    padded = [pad_answers([e.prompt], [e.answer], eos=eos, extra=0, least=least) for e in _examples(model, batch)]
    return [row for rows, _ in padded for row in rows], [label for _, labels in padded for label in labels]


def _examples(model: LavidaModules, batch: TrainBatch) -> list[Example]:
    prompts = batch.questions if batch.prompts is None else batch.prompts
    histories = [()] * len(prompts) if batch.histories is None else batch.histories
    return [
        training_example(model.tokenizer, prompt, answer, model.config, history=history)
        for prompt, answer, history in zip(prompts, batch.answers, histories, strict=True)
    ]


def batch_loss(
    model: LavidaModules,
    batch: TrainBatch,
    selector: Selector,
    objective: ObjectiveConfig,
    generator: torch.Generator,
    *,
    relevance: Relevance | None,
    shard: Shard,
    tally: Tally | None,
) -> Tensor:
    """The loss of `Lavida.loss`: masked cross entropy of the answers, plus the auxiliary losses of the objective."""
    tally = tally or Tally()
    encoder = PictureEncoder(model, selector, relevance, NoTimer())
    blocks, selections = encoder.blocks(PicturePrompts(batch.images, batch.questions, batch.ids, batch.boxes))
    extra = extra_padding(objective, generator)
    rows, labels = rows_of(model, batch, extra=extra, least=objective.answer_tokens or 0, agree=shard.largest)
    loss = rows_loss(model, rows, labels, blocks, objective, generator, shard=shard, tally=tally)
    if objective.alignment:
        tally.terms["alignment"] = alignment(model, batch, blocks, selections, shard)
        loss = loss + objective.alignment * tally.terms["alignment"]
    if objective.adaptive_k and tally.row_loss_B is not None:
        tally.terms["adaptive_k"] = adaptive_k_loss(selections, tally.row_loss_B, shard)
        loss = loss + objective.adaptive_k * tally.terms["adaptive_k"]
    return loss


def rows_loss(
    model: LavidaModules,
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    blocks: Sequence[Tensor],
    objective: ObjectiveConfig,
    generator: torch.Generator,
    *,
    shard: Shard = SINGLE,
    tally: Tally | None = None,
) -> Tensor:
    """The loss of token rows with one picture block each; rows longer than the model's context are cut on the right.

    Raises:
        UserError: for a row without a target.
    """
    max_length = model.config.tokenizer_model_max_length
    room = [max_length - len(block) + 1 for block in blocks]
    rows = [row[:n] for row, n in zip(rows, room, strict=True)]
    labels = [label[:n] for label, n in zip(labels, room, strict=True)]
    for i, label in enumerate(labels):
        if all(token == IGNORE for token in label):
            raise UserError(f"training row {i} has no target token: its answer was empty or cut away")
    whole, labels_BL = splice(rows, blocks, model.lm.embedding, max_length=max_length, labels=labels)
    b, length = labels_BL.shape
    whole_b, longest = b * shard.world, shard.largest(length)
    t_B = shard.rows(sample_times(whole_b, objective.time, generator, model.device))
    u_BL = shard.rows(torch.rand(whole_b, longest, generator=generator, device=model.device))
    if tally is not None:
        tally.tokens = sum(len(row) - 1 + len(block) for row, block in zip(rows, blocks, strict=True))
    return draw_loss(model, whole, labels_BL, t_B, u_BL, objective, shard=shard, tally=tally)


def draw_loss(
    model: LavidaModules,
    whole: Prefix,
    labels_BL: Tensor,
    t_B: Tensor,
    u_BL: Tensor,
    objective: ObjectiveConfig,
    *,
    shard: Shard = SINGLE,
    tally: Tally | None = None,
) -> Tensor:
    """The loss of spliced rows at noise levels `t_B`, with one uniform random number `u_BL` per position.

    Numbers beyond the end of a row only count for the row's minimum.
    """
    target_BL = labels_BL != IGNORE
    masked_BL, complement_BL = masked_targets(target_BL, t_B, u_BL[:, : labels_BL.shape[1]], u_BL.amin(-1))
    copies = [masked_BL, complement_BL] if objective.complementary else [masked_BL]
    masked_CL = torch.cat(copies)
    states = states_of_copies(model, whole, labels_BL, masked_CL, prefix_mask=objective.prefix_mask)
    at_M = masked_CL.flatten().nonzero()[:, 0]  # one wait; each bool mask as an index would be another
    ahead = model.lm.shift  # a target is predicted by the position so many places before it
    logits_MW = model.lm.logits(states.flatten(0, 1).index_select(0, at_M - ahead))
    labels_M, row_M = labels_BL.repeat(len(copies), 1).flatten()[at_M], at_M // masked_CL.shape[1]
    n_masked = shard.mean(len(labels_M)) or 1.0
    if tally is not None:
        tally.masked, tally.right = n_masked, (logits_MW.detach().argmax(-1) == labels_M).sum()
        if objective.adaptive_k:
            tally.row_loss_B = row_losses(logits_MW, labels_M, row_M % len(labels_BL), len(labels_BL))
    if objective.weighting == "none":
        return masked_cross_entropy(logits_MW, labels_M, n_targets=n_masked)
    p_B = mask_probability(t_B)
    # Each copy alone is an unbiased estimate of the loss; two copies are averaged.
    weight_C = torch.cat([p_B, 1 - p_B][: len(copies)]).clamp_min(1e-3).reciprocal() / len(copies)
    # Together the two copies mask every target once.
    n_targets = n_masked if objective.complementary else shard.mean(int(target_BL.sum()))
    return masked_cross_entropy(logits_MW, labels_M, weight_C[row_M], n_targets=n_targets)
