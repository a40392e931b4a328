"""Masked diffusion over the answer: where it starts, the denoising loop, and what comes out.

docs/lavida.md, "Denoising". A step predicts every masked slot and commits some of the predictions. The schedule
(`lavida_adapter.schedules`) says how many, the sampler (`lavida_adapter.sampling`, `lavida_adapter.dream_sampling`)
which ones.

Shape letters: B batch, A answer slots, M slots whose logits a step computes, W vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.kv_cache import StoredPrefix
from lavida_adapter.sampling import LLADA_SAMPLER, Denoised, Draw, LogitsFn, Sampler, confidence
from lavida_adapter.schedules import drawn_counts, tokens_per_step
from shirg import UserError


@dataclass(frozen=True)
class Generation:
    """Answers [B, A] as ids and text, with what they cost."""

    ids_BA: Tensor
    texts: tuple[str, ...]
    forwards: int
    """Denoising forwards; the prefix is not counted."""
    steps: tuple[int, ...]
    """Of each answer: the forwards that ran while it was unfinished."""
    history: tuple[Tensor, ...] = ()
    """The answer after every step, when asked for."""
    confidence: tuple[Tensor, ...] = ()
    """float32 [B, A] of every step, with `history`: the probability of each token that it committed, 0 elsewhere. Empty
    where a published loop runs (`decode.parity` of Dream), which does not tell."""
    cached_BP: Tensor | None = None
    """bool: prefix slots that the last step of each answer could read; None without a cache selector. All of them for
    an answer that was complete before the cut."""
    cache: StoredPrefix | None = None
    """The cache that the last step read; None without a prefix cache."""

    def __repr__(self) -> str:
        return f"Generation(texts={self.texts!r}, forwards={self.forwards}, steps={self.steps!r})"


def start(batch: int, config: DecodeConfig, mask_id: int, drafts: Sequence[Sequence[int]]) -> Tensor:
    """Answer slots [B, A] on the host: each row's draft, then masks. Masks inside a draft are filled like the others.

    Args:
        drafts: one for each row, of any length and possibly empty; none at all for answers of masks alone.

    Raises:
        UserError: when a draft is longer than the answer, or when there are not as many drafts as rows.
    """
    if drafts and len(drafts) != batch:
        raise UserError(f"{len(drafts)} drafts for {batch} prompts: give one for each prompt, an empty one for none")
    ids_BA = torch.full((batch, config.max_new_tokens), mask_id, dtype=torch.int64)
    for row, draft in enumerate(drafts):
        if len(draft) > config.max_new_tokens:
            raise UserError(
                f"the draft has {len(draft)} tokens, the answer only {config.max_new_tokens}: raise max_new_tokens"
            )
        ids_BA[row, : len(draft)] = torch.tensor(list(draft), dtype=torch.int64)
    return ids_BA


def masks_left(ids_BA: Tensor, mask_id: int, block: int) -> list[list[int]]:
    """How many masks each row has in each block. For answers on a GPU the host waits."""
    counts: list[list[int]] = (ids_BA == mask_id).unflatten(-1, (-1, block)).sum(-1).tolist()
    return counts


def denoise(
    logits_of: LogitsFn,
    ids_BA: Tensor,
    config: DecodeConfig,
    mask_id: int,
    generator: torch.Generator | None = None,
    *,
    sampler: Sampler = LLADA_SAMPLER,
    eos_id: int | None = None,
    least_slots: int = 1,
    n_masks: list[list[int]] | None = None,
    sure: list[Tensor] | None = None,
) -> Denoised:
    """Fills every mask of `ids_BA`; returns the ids, the number of forwards in all and for each row, and the history.

    Each row has its own schedule, so that its answer does not depend on the other rows of the batch. Committed tokens
    never change. A step that no row commits anything in is not run. A step computes the logits of at least
    `least_slots` slots of the block, so that shapes vary less.

    `n_masks`: how many masks each row has in each block; None asks the device, for which the host has to wait. Options
    under which a step may commit any number of tokens take one such wait a step, when all of its work is queued.

    `sure` is filled with `Generation.confidence`.
    """
    if config.parity and sampler.published is not None:
        return sampler.published(logits_of, ids_BA, config, mask_id, generator)
    ids_BA = ended(ids_BA.clone(), config, mask_id, eos_id)
    history: list[Tensor] = []
    forwards, steps = 0, [0] * len(ids_BA)
    # The schedule says how many slots stay masked; with these options it depends on the predictions.
    must_look = config.allow_mask_token or config.early_stop or config.threshold is not None
    n_masks = masks_left(ids_BA, mask_id, config.block) if n_masks is None else n_masks
    for number in range(config.max_new_tokens // config.block):
        here = slice(number * config.block, (number + 1) * config.block)
        left = [of_blocks[number] for of_blocks in n_masks]
        counts = [planned_counts(n, config, sampler, generator) for n in left]
        for step in range(max(map(len, counts))):
            ks = [min(count[step] if step < len(count) else 0, n) for count, n in zip(counts, left, strict=True)]
            if not any(ks):
                continue
            want_BM, open_BM = wanted(ids_BA, mask_id, here, min(max(least_slots, *left), config.block))
            logits_BMW = logits_of(ids_BA, want_BM)
            forwards += 1
            steps = [taken + (n > 0) for taken, n in zip(steps, left, strict=True)]
            if not config.allow_mask_token:
                logits_BMW[..., mask_id] = float("-inf")
            draw = Draw(generator, ids_BA.shape[1], want_BM)
            tokens_BM, commit_BM = sampler.commit(logits_BMW, open_BM, ks, config.rule, draw)
            ids_BA = ended(write(ids_BA, want_BM, tokens_BM, commit_BM), config, mask_id, eos_id)
            if config.keep_history:
                history.append(ids_BA)
            if sure is not None:
                p_BM = commit_BM * confidence(logits_BMW, tokens_BM, "low_confidence", torch.float32)
                sure.append(p_BM if want_BM is None else p_BM.new_zeros(ids_BA.shape).scatter(1, want_BM, p_BM))
            if must_look:
                n_masks = masks_left(ids_BA, mask_id, config.block)
                left = [of_blocks[number] for of_blocks in n_masks]
            else:
                left = [n - k for n, k in zip(left, ks, strict=True)]
    return ids_BA, forwards, steps, history


FillingSteps = list[tuple[int, int]]
"""The steps that fill something in an answer: number of the block, number of the step in it."""


def filling_steps(n_masks: list[list[int]], config: DecodeConfig, sampler: Sampler) -> list[FillingSteps]:
    """The steps that run for each row, by its masks in each block; where content or a draw decides, the most there are.

    They may be fewer than `config.steps`: a time grid begins with steps that fill nothing, which are not run.
    """
    if config.parity and sampler.published is not None:
        return [[(0, step) for step in range(config.steps_per_block)] for _ in n_masks]  # there, all of them run

    def counts(n: int) -> list[int]:
        if config.remasking == "origin":
            return [1] * min(n, config.steps_per_block)  # drawn while decoding
        return planned_counts(n, config, sampler, None)

    return [
        [(block, step) for block, n in enumerate(of_blocks) for step, k in enumerate(counts(n)) if k > 0]
        for of_blocks in n_masks
    ]


def planned_counts(
    n_masks: int, config: DecodeConfig, sampler: Sampler, generator: torch.Generator | None
) -> list[int]:
    """How many of a row's masks in a block each step commits."""
    if config.threshold is not None:
        return [1] * n_masks  # at least
    if n_masks > 0 and config.remasking == "origin":
        return drawn_counts(n_masks, config.steps_per_block, config.eps, generator)
    schedule = sampler.schedule if config.schedule == "none" else config.schedule
    return tokens_per_step(n_masks, config.steps_per_block, schedule, config.shift, config.eps)


def wanted(ids_BA: Tensor, mask_id: int, here: slice, m: int) -> tuple[Tensor | None, Tensor]:
    """The first `m` slots [B, m] of a block, masked ones first, None for the whole answer; and which are masked."""
    open_BA = ids_BA[:, here] == mask_id
    if m == open_BA.shape[1]:
        if m == ids_BA.shape[1]:
            return None, open_BA
        return torch.arange(here.start, here.stop, device=ids_BA.device).expand(len(ids_BA), -1), open_BA
    order_BM = torch.sort(~open_BA, dim=-1, stable=True).indices[:, :m]
    return here.start + order_BM, open_BA.gather(1, order_BM)


def write(ids_BA: Tensor, want_BM: Tensor | None, tokens_BM: Tensor, commit_BM: Tensor) -> Tensor:
    """The answer with the committed candidates written to it."""
    if want_BM is None:
        return torch.where(commit_BM, tokens_BM, ids_BA)
    return ids_BA.scatter(1, want_BM, torch.where(commit_BM, tokens_BM, ids_BA.gather(1, want_BM)))


def ended(ids_BA: Tensor, config: DecodeConfig, mask_id: int, eos_id: int | None) -> Tensor:
    """The answers; with `early_stop` those that have ended are filled up.

    Raises:
        UserError: for `early_stop` without an eos token.
    """
    if not config.early_stop:
        return ids_BA
    if eos_id is None:
        raise UserError("decode.early_stop=true needs the model's eos token")
    return stop_early(ids_BA, mask_id, eos_id)


def stop_early(ids_BA: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Fills masks with eos in rows where no slot before the first eos is masked and all after it are eos or masked."""
    is_mask, is_eos = ids_BA == mask_id, ids_BA == eos_id
    behind_BA = is_eos.cumsum(-1) > 0
    ended_B1 = is_eos.any(-1, keepdim=True) & (behind_BA | ~is_mask).all(-1, keepdim=True)
    ended_B1 &= (~behind_BA | is_eos | is_mask).all(-1, keepdim=True)
    return ids_BA.masked_fill(ended_B1 & is_mask, eos_id)
