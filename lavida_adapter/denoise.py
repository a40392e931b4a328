"""The denoising loop: masks become tokens, a few per step, the surest first.

docs/lavida.md, "Denoising" and "Remasking".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lavida_adapter.cache import StoredPrefix
from lavida_adapter.choose import REMASKING, Draw, Rule, commit_tokens
from lavida_adapter.schedule import SCHEDULES, tokens_per_step

Engine = Literal["eager", "compile", "graph"]
"""How steps are launched: one kernel after the other, compiled by torch, or replayed as a CUDA graph."""

LogitsFn = Callable[[Tensor, Tensor | None], Tensor]
"""Answer ids [B, A] and the slots that matter [B, M], None for all -> their logits [B, M, vocabulary], in a tensor that
the loop may change."""


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
    threshold: float | None = None
    """Commits every token that is at least so probable, and one in any case (Fast-dLLM, arXiv 2505.22618); the number
    of steps then depends on the answer."""
    early_stop: bool = False
    """Ends an answer when everything behind its first eos is eos or still masked: those masks become eos."""
    engine: Engine = "eager"
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
        if self.engine not in get_args(Engine):
            raise ValueError(f"decode.engine={self.engine!r}: choose one of {', '.join(get_args(Engine))}")
        if self.engine != "eager" and not self.prefix_cache:
            raise ValueError(
                f"decode.engine={self.engine} runs steps over a prefix cache, and with decode.prefix_cache=false there "
                "is none: choose decode.engine=eager"
            )
        self._check_threshold()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"decode.schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"decode.shift={self.shift}: give a positive number")
        if self.remasking not in REMASKING:
            raise ValueError(f"decode.remasking={self.remasking!r}: choose one of {', '.join(REMASKING)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"decode.temperature={self.temperature}: give 0 or more")

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise ValueError(f"decode.threshold={self.threshold}: give a probability, above 0 and at most 1")
        if self.step_ratio is not None or self.step_per_block is not None or self.schedule != "none":
            raise ValueError(
                "decode.threshold decides itself how many tokens a step commits: leave out step_ratio, step_per_block "
                "and schedule"
            )
        if self.remasking != "low_confidence":
            raise ValueError(
                f"decode.threshold is a probability, and decode.remasking={self.remasking} ranks by something else: "
                "choose low_confidence"
            )

    @property
    def block(self) -> int:
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def steps_per_block(self) -> int:
        if self.step_per_block is not None:
            return min(self.step_per_block, self.block)
        return self.block if self.step_ratio is None else int(self.block * self.step_ratio)

    @property
    def rule(self) -> Rule:
        return Rule(self.remasking, self.temperature, self.threshold)

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
    steps: tuple[int, ...]
    """For each answer, the forwards that found it unfinished."""
    history: tuple[Tensor, ...] = ()
    """The answer after every step, when asked for."""
    cached_BP: Tensor | None = None
    """bool: the prefix's slots that were in the cache at the end; None when nobody was asked to shorten it."""
    cache: StoredPrefix | None = None
    """What the last step read; None without a prefix cache."""


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
    logits_of: LogitsFn,
    ids_BA: Tensor,
    config: DecodeConfig,
    mask_id: int,
    generator: torch.Generator | None = None,
    *,
    eos_id: int | None = None,
    least_slots: int = 1,
) -> tuple[Tensor, int, list[int], list[Tensor]]:
    """Fills every mask of `ids_BA`; returns the ids, the number of forwards in all and for each row, and the history.

    Schedules are computed per row, so that a row's answer does not depend on its batch-mates. Committed tokens never
    change. A step asks for the logits of `least_slots` slots of the block at least, so that shapes vary less.
    """
    if config.early_stop and eos_id is None:
        raise ValueError("decode.early_stop=true needs the model's eos token")
    ids_BA = ids_BA.clone()
    history: list[Tensor] = []
    forwards, steps = 0, [0] * len(ids_BA)
    # What a step leaves masked follows from the schedule, unless what it finds out decides.
    must_look = config.allow_mask_token or config.early_stop or config.threshold is not None
    for begin in range(0, config.max_new_tokens, config.block):
        here = slice(begin, begin + config.block)
        left = (ids_BA[:, here] == mask_id).sum(-1).tolist()
        counts = [tokens_per_step(n, config.steps_per_block, config.schedule, config.shift) for n in left]
        for step in range(max(map(len, counts))):
            if not any(left):
                break
            ks = [min(count[step] if step < len(count) else 0, n) for count, n in zip(counts, left, strict=True)]
            want_BM, open_BM = wanted(ids_BA, mask_id, here, min(max(least_slots, *left), config.block))
            logits_BMW = logits_of(ids_BA, want_BM)
            forwards += 1
            steps = [taken + (n > 0) for taken, n in zip(steps, left, strict=True)]
            if not config.allow_mask_token:
                logits_BMW[..., mask_id] = float("-inf")
            draw = Draw(generator, ids_BA.shape[1], want_BM)
            tokens_BM, commit_BM = commit_tokens(logits_BMW, open_BM, ks, config.rule, draw)
            ids_BA = write(ids_BA, want_BM, tokens_BM, commit_BM)
            if config.early_stop:
                assert eos_id is not None
                ids_BA = stop_early(ids_BA, mask_id, eos_id)
            if config.keep_history:
                history.append(ids_BA)
            if must_look:
                left = (ids_BA[:, here] == mask_id).sum(-1).tolist()
            else:
                left = [n - k for n, k in zip(left, ks, strict=True)]
    return ids_BA, forwards, steps, history


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
    """The answer with the committed candidates in it."""
    if want_BM is None:
        return torch.where(commit_BM, tokens_BM, ids_BA)
    return ids_BA.scatter(1, want_BM, torch.where(commit_BM, tokens_BM, ids_BA.gather(1, want_BM)))


def stop_early(ids_BA: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Fills with eos what is still masked in rows where nothing before an eos is masked and all behind it is eos."""
    is_mask, is_eos = ids_BA == mask_id, ids_BA == eos_id
    behind_BA = is_eos.cumsum(-1) > 0
    ended_B1 = is_eos.any(-1, keepdim=True) & (behind_BA | ~is_mask).all(-1, keepdim=True)
    ended_B1 &= (~behind_BA | is_eos | is_mask).all(-1, keepdim=True)
    return ids_BA.masked_fill(ended_B1 & is_mask, eos_id)
