"""The denoising loop: masks become tokens, a few per step, the surest first.

docs/lavida.md, "Denoising" and "Remasking".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavida_adapter.schedule import SCHEDULES, tokens_per_step

REMASKING = ("low_confidence", "margin", "entropy", "random")

LogitsFn = Callable[[Tensor], Tensor]
"""Answer ids [B, A] -> logits [B, A, vocabulary]."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How an answer is generated. Every field changes the answer or its cost; an impossible combination raises."""

    max_new_tokens: int = 16
    block_length: int | None = None
    """Blocks are finished from left to right; None is one block."""
    step_ratio: float | None = None
    """Steps per block as a share of its length."""
    step_per_block: int | None = None
    """Steps per block as a number; one token per step when neither is given."""
    schedule: str = "none"
    shift: float = 1 / 3
    remasking: str = "low_confidence"
    temperature: float = 0.0
    prefix_cache: bool = True
    """False runs prompt and answer together at every step, as the reference does without its prefix mode."""
    allow_mask_token: bool = False
    """True lets a step commit the mask token itself, which leaves a hole: the reference's behaviour."""
    keep_history: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"decode.max_new_tokens={self.max_new_tokens}: give at least 1")
        if self.block < 1 or self.max_new_tokens % self.block:
            raise ValueError(
                f"decode.block_length={self.block} does not divide decode.max_new_tokens={self.max_new_tokens}: "
                "choose a divisor, or null for one block"
            )
        if self.step_ratio is not None and self.step_per_block is not None:
            raise ValueError(
                "decode.step_ratio and decode.step_per_block both set the number of steps: give one of them"
            )
        if self.step_ratio is not None and not 0 < self.step_ratio <= 1:
            raise ValueError(f"decode.step_ratio={self.step_ratio}: give a share of the block, above 0 and at most 1")
        if self.steps_per_block < 1:
            raise ValueError(
                f"decode: step_ratio={self.step_ratio}, step_per_block={self.step_per_block} leave no step for a block "
                f"of {self.block} tokens"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"decode.schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"decode.shift={self.shift}: give a positive number")
        if self.remasking not in REMASKING:
            raise ValueError(f"decode.remasking={self.remasking!r}: choose one of {', '.join(REMASKING)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"decode.temperature={self.temperature}: give 0 or more")

    @property
    def block(self) -> int:
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def steps_per_block(self) -> int:
        if self.step_per_block is not None:
            return min(self.step_per_block, self.block)
        return self.block if self.step_ratio is None else int(self.block * self.step_ratio)

    @property
    def steps(self) -> int:
        """The most forwards that an answer can take."""
        return self.max_new_tokens // self.block * self.steps_per_block


@dataclass(frozen=True)
class Generation:
    """Answers [B, A] as ids and text, with what they cost."""

    ids_BA: Tensor
    texts: tuple[str, ...]
    forwards: int
    """Denoising forwards; the prefix is not counted."""
    history: tuple[Tensor, ...] = ()
    """The answer after every step, when asked for."""
    cached_BP: Tensor | None = None
    """bool: the prefix's slots that were in the cache at the end; None when nobody was asked to shorten it."""


def start(batch: int, config: DecodeConfig, mask_id: int, draft: Sequence[int], device: torch.device) -> Tensor:
    """Answer slots [B, A], all masks but for a draft at the start; masks inside the draft are holes to fill.

    Raises:
        ValueError: when the draft is longer than the answer.
    """
    if len(draft) > config.max_new_tokens:
        raise ValueError(
            f"the draft has {len(draft)} tokens, the answer only {config.max_new_tokens}: raise max_new_tokens"
        )
    ids_BA = torch.full((batch, config.max_new_tokens), mask_id, dtype=torch.int64, device=device)
    if draft:
        ids_BA[:, : len(draft)] = torch.tensor(list(draft), dtype=torch.int64, device=device)
    return ids_BA


def denoise(
    logits_of: LogitsFn, ids_BA: Tensor, config: DecodeConfig, mask_id: int, generator: torch.Generator | None = None
) -> tuple[Tensor, int, list[Tensor]]:
    """Fills every mask of `ids_BA`; returns the ids, the number of forwards and the history.

    Schedules are computed per row, so that a row's answer does not depend on its batch-mates. Committed tokens never
    change; no token ends the answer early.
    """
    ids_BA = ids_BA.clone()
    history: list[Tensor] = []
    forwards = 0
    for begin in range(0, config.max_new_tokens, config.block):
        end = begin + config.block
        n_masks = (ids_BA[:, begin:end] == mask_id).sum(-1).tolist()
        counts = [tokens_per_step(n, config.steps_per_block, config.schedule, config.shift) for n in n_masks]
        for step in range(max(map(len, counts))):
            masked_BA = ids_BA == mask_id
            masked_BA[:, end:] = False
            if not masked_BA[:, begin:end].any():
                break
            logits = logits_of(ids_BA)
            forwards += 1
            token_BA, confidence_BA = choose(logits, config, mask_id, generator)
            confidence_BA = confidence_BA.masked_fill(~masked_BA, float("-inf"))
            commit_BA = torch.zeros_like(masked_BA)
            for row, count in enumerate(counts):
                k = count[step] if step < len(count) else 0
                commit_BA[row, confidence_BA[row].topk(k).indices] = True
            ids_BA = torch.where(commit_BA, token_BA, ids_BA)
            if config.keep_history:
                history.append(ids_BA.clone())
    return ids_BA, forwards, history


def choose(
    logits_BAW: Tensor, config: DecodeConfig, mask_id: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The candidate token of every slot and its confidence in float64 [B, A].

    Confidence is read from the clean logits; temperature perturbs the candidate alone (Gumbel noise in float64).
    """
    logits = logits_BAW.to(torch.float64, copy=True)
    if not config.allow_mask_token:
        logits[..., mask_id] = float("-inf")
    if config.temperature > 0:
        u = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
        token_BA = (logits.exp() / (-torch.log(u)) ** config.temperature).argmax(-1)
    else:
        token_BA = logits.argmax(-1)
    if config.remasking == "random":
        return token_BA, torch.rand(token_BA.shape, dtype=torch.float64, device=logits.device, generator=generator)
    p = logits.softmax(-1)
    if config.remasking == "low_confidence":
        return token_BA, p.gather(-1, token_BA[..., None])[..., 0]
    if config.remasking == "margin":
        top = p.topk(2, dim=-1).values
        return token_BA, top[..., 0] - top[..., 1]
    return token_BA, (p * torch.log(p + 1e-10)).sum(-1)
