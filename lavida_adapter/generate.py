"""Masked diffusion over the answer: the decoding options, the denoising loop, and what each step commits.

docs/lavida.md, "Denoising", "Schedules", "Remasking". A step predicts every masked slot and commits some of the
predictions. The schedule says how many, the remasking rule says which ones.

Shape letters: B batch, A answer slots, M slots whose logits a step computes, W vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lavida_adapter.kv_cache import StoredPrefix
from shirg import UserError

Engine = Literal["eager", "compile", "graph"]
"""How steps run: kernel by kernel, compiled by torch, or replayed as a CUDA graph."""

LogitsFn = Callable[[Tensor, Tensor | None], Tensor]
"""Answer ids [B, A] and the wanted slots [B, M] (None: all) -> logits [B, M, W]. The loop may write to the result."""

SCHEDULES = ("none", "shift", "cosine", "linear", "logit_normal")
REMASKING = ("low_confidence", "margin", "entropy", "random")


@dataclass(frozen=True)
class Rule:
    """Which slots a step commits."""

    remasking: str = "low_confidence"
    temperature: float = 0.0
    threshold: float | None = None
    """Commits every slot with at least this probability, and one in any case, instead of a fixed number of slots."""


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
    """False runs prompt and answer together at every step, like the reference without its prefix mode."""
    allow_mask_token: bool = False
    """True lets a step commit the mask token itself, which leaves the slot masked: the reference's behaviour."""
    threshold: float | None = None
    """Commits every token with at least this probability, and one in any case (Fast-dLLM, arXiv 2505.22618). The number
    of steps then depends on the answer."""
    early_stop: bool = False
    """Ends an answer when everything after its first eos is eos or still masked; those masks become eos."""
    engine: Engine = "eager"
    keep_history: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"decode.max_new_tokens={self.max_new_tokens}: give at least 1")
        self._check_steps()
        self._check_threshold()
        if self.engine not in get_args(Engine):
            raise UserError(f"decode.engine={self.engine!r}: choose one of {', '.join(get_args(Engine))}")
        if self.engine != "eager" and not self.prefix_cache:
            raise UserError(
                f"decode.engine={self.engine} runs steps over a prefix cache, and decode.prefix_cache=false has none: "
                "choose decode.engine=eager"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"decode.schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0 < self.shift < math.inf:
            raise UserError(f"decode.shift={self.shift}: give a positive number")
        if self.remasking not in REMASKING:
            raise UserError(f"decode.remasking={self.remasking!r}: choose one of {', '.join(REMASKING)}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"decode.temperature={self.temperature}: give 0 or more")

    def _check_steps(self) -> None:
        if self.block < 1 or self.max_new_tokens % self.block:
            raise UserError(
                f"decode.block_length={self.block} does not divide decode.max_new_tokens={self.max_new_tokens}: "
                "choose a divisor, or null for one block"
            )
        if self.step_ratio is not None and self.step_per_block is not None:
            raise UserError(
                "decode.step_ratio and decode.step_per_block both set the number of steps: give one of them"
            )
        if self.step_ratio is not None and not 0 < self.step_ratio <= 1:
            raise UserError(f"decode.step_ratio={self.step_ratio}: give a share of the block, above 0 and at most 1")
        if self.steps_per_block < 1:
            raise UserError(
                f"decode: step_ratio={self.step_ratio}, step_per_block={self.step_per_block} leave no step for a block "
                f"of {self.block} tokens"
            )

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise UserError(f"decode.threshold={self.threshold}: give a probability, above 0 and at most 1")
        if self.step_ratio is not None or self.step_per_block is not None or self.schedule != "none":
            raise UserError(
                "decode.threshold sets the number of tokens that a step commits: leave out step_ratio, step_per_block "
                "and schedule"
            )
        if self.remasking != "low_confidence":
            raise UserError(
                f"decode.threshold is a probability, and decode.remasking={self.remasking} does not rank by it: "
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
    """Of each answer: the forwards that ran while it was unfinished."""
    history: tuple[Tensor, ...] = ()
    """The answer after every step, when asked for."""
    cached_BP: Tensor | None = None
    """bool: prefix slots that were in the cache at the end; None without a cache selector."""
    cache: StoredPrefix | None = None
    """The cache that the last step read; None without a prefix cache."""

    def __repr__(self) -> str:
        return f"Generation(texts={self.texts!r}, forwards={self.forwards}, steps={self.steps!r})"


def start(
    batch: int, config: DecodeConfig, mask_id: int, drafts: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Answer slots [B, A]: each row's draft, then masks. Masks inside a draft are filled like the others.

    Args:
        drafts: one for each row, of any length and possibly empty; none at all for answers of masks alone.

    Raises:
        UserError: when a draft is longer than the answer, or when there are not as many drafts as rows.
    """
    if drafts and len(drafts) != batch:
        raise UserError(f"{len(drafts)} drafts for {batch} prompts: give one for each prompt, an empty one for none")
    ids_BA = torch.full((batch, config.max_new_tokens), mask_id, dtype=torch.int64, device=device)
    for row, draft in enumerate(drafts):
        if len(draft) > config.max_new_tokens:
            raise UserError(
                f"the draft has {len(draft)} tokens, the answer only {config.max_new_tokens}: raise max_new_tokens"
            )
        ids_BA[row, : len(draft)] = torch.tensor(list(draft), dtype=torch.int64, device=device)
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

    Each row has its own schedule, so that its answer does not depend on the other rows of the batch. Committed tokens
    never change. A step computes the logits of at least `least_slots` slots of the block, so that shapes vary less.
    """
    if config.early_stop and eos_id is None:
        raise UserError("decode.early_stop=true needs the model's eos token")
    ids_BA = ids_BA.clone()
    history: list[Tensor] = []
    forwards, steps = 0, [0] * len(ids_BA)
    # The schedule says how many slots stay masked; with these options it depends on the predictions.
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
    """The answer with the committed candidates written to it."""
    if want_BM is None:
        return torch.where(commit_BM, tokens_BM, ids_BA)
    return ids_BA.scatter(1, want_BM, torch.where(commit_BM, tokens_BM, ids_BA.gather(1, want_BM)))


def stop_early(ids_BA: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Fills masks with eos in rows where no slot before the first eos is masked and all after it are eos or masked."""
    is_mask, is_eos = ids_BA == mask_id, ids_BA == eos_id
    behind_BA = is_eos.cumsum(-1) > 0
    ended_B1 = is_eos.any(-1, keepdim=True) & (behind_BA | ~is_mask).all(-1, keepdim=True)
    ended_B1 &= (~behind_BA | is_eos | is_mask).all(-1, keepdim=True)
    return ids_BA.masked_fill(ended_B1 & is_mask, eos_id)


def tokens_per_step(n_masks: int, steps: int, schedule: str = "none", shift: float = 1 / 3) -> list[int]:
    """How many tokens each step commits. The counts sum to `n_masks`; never more steps than masks.

    `shift` < 1 commits many tokens early, > 1 late. The reference's default is 3, its paper recommends 1/3.

    Raises:
        UserError: for an unknown schedule, no steps, or a shift that is not positive.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"decode.schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if steps < 1:
        raise UserError(f"decode: {steps} denoising steps per block; raise step_ratio or step_per_block")
    if n_masks == 0:
        return []
    if schedule == "none":
        base, extra = divmod(n_masks, steps)
        return [base + (i < extra) for i in range(steps)]
    steps = min(steps, n_masks)
    progress = _progress(torch.linspace(0, 1, steps + 1, dtype=torch.float32), schedule, shift)
    committed = (progress * n_masks).to(torch.int64)
    committed[-1] = n_masks  # rounding may end just below 1, which would leave a mask
    counts: list[int] = (committed[1:] - committed[:-1]).clamp_min(1).tolist()
    surplus = sum(counts) - n_masks
    j = 0
    while surplus > 0:
        if counts[j % steps] > 1:
            counts[j % steps] -= 1
            surplus -= 1
        j += 1
    return counts[::-1]


def _progress(t: Tensor, schedule: str, shift: float) -> Tensor:
    """Share of the masks that is committed at time t, before the order of the steps is reversed."""
    if schedule == "shift":
        if not 0 < shift < math.inf:
            raise UserError(f"decode.shift={shift}: give a positive number")
        return shift * t / (1 + (shift - 1) * t)
    if schedule == "cosine":
        return 1 - 0.5 * (1 + torch.cos(torch.pi * t))
    if schedule == "logit_normal":
        return 0.5 * (1 + torch.erf(torch.logit(t) / 2**0.5))
    return t


TOLERANCE = 2e-5
"""Two float32 probabilities closer than this (relative to the larger) might rank differently in float64: exp(-80) has a
relative error of 5e-6, a sum of 100,000 exponentials one of a few 1e-7."""
SMALLEST = 1e-37
"""Below this value float32 has no significant digits left."""


@dataclass(frozen=True)
class Draw:
    """Random numbers as the reference draws them: for every slot of the answer, even if only some are wanted."""

    generator: torch.Generator | None
    n_answer: int
    want_BM: Tensor | None
    """The wanted slots; None: all."""

    def uniform(self, batch: int, device: torch.device, width: int | None = None) -> Tensor:
        """[B, M] or [B, M, W] in float64."""
        shape = (batch, self.n_answer) if width is None else (batch, self.n_answer, width)
        u = torch.rand(shape, dtype=torch.float64, device=device, generator=self.generator)
        if self.want_BM is None:
            return u
        if width is None:
            return u.gather(1, self.want_BM)
        return u.gather(1, self.want_BM[..., None].expand(-1, -1, width))


def commit_tokens(
    logits_BMW: Tensor, open_BM: Tensor, ks: Sequence[int], rule: Rule, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Candidates [B, M], and which are committed [B, M]: in each row the `ks` most confident of the open slots."""
    tokens_BM = candidates(logits_BMW, rule.temperature, draw)
    if rule.remasking == "random":
        return tokens_BM, topk_confident(draw.uniform(len(open_BM), open_BM.device), open_BM, ks)
    if rule.threshold is not None:
        sure_BM = confidence(logits_BMW, tokens_BM, rule.remasking)
        best_BM = topk_confident(sure_BM, open_BM, [1] * len(ks))
        return tokens_BM, open_BM & ((sure_BM >= rule.threshold) | best_BM)
    if min(ks) == open_BM.shape[1]:
        return tokens_BM, open_BM  # all remaining slots: no ranking needed
    # On a CPU float32 is faster and usually ranks the same. On a GPU the check would force a synchronisation.
    if rule.remasking == "low_confidence" and open_BM.device.type == "cpu":
        quick_BM = confidence(logits_BMW, tokens_BM, rule.remasking, torch.float32)
        if is_clear(quick_BM, open_BM, ks):
            return tokens_BM, topk_confident(quick_BM, open_BM, ks)
    return tokens_BM, topk_confident(confidence(logits_BMW, tokens_BM, rule.remasking), open_BM, ks)


def candidates(logits_BMW: Tensor, temperature: float, draw: Draw) -> Tensor:
    """The most likely token of every slot; with a temperature T the argmax of exp(logit) / (-ln u)^T in float64."""
    if temperature == 0:
        return logits_BMW.max(-1).indices  # ties as in argmax, three times faster on a CPU
    u = draw.uniform(len(logits_BMW), logits_BMW.device, logits_BMW.shape[-1])
    return (logits_BMW.double().exp() / (-torch.log(u)) ** temperature).argmax(-1)


def confidence(logits_BMW: Tensor, tokens_BM: Tensor, remasking: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Confidence in each candidate [B, M], from the logits without temperature."""
    p = logits_BMW.to(dtype).softmax(-1)
    if remasking == "low_confidence":
        return p.gather(-1, tokens_BM[..., None])[..., 0]
    if remasking == "margin":
        top = p.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    return (p * torch.log(p + 1e-10)).sum(-1)


def is_clear(quick_BM: Tensor, open_BM: Tensor, ks: Sequence[int]) -> bool:
    """Whether the `ks` largest of each row are the same in float64 for certain: the next one is well below them."""
    ranked = quick_BM.masked_fill(~open_BM, -1.0).sort(-1, descending=True).values.tolist()
    pairs = ((row[k - 1], row[k]) for row, k in zip(ranked, ks, strict=True) if 0 < k < len(row))
    return all((1 - TOLERANCE) * last > max(next_one, SMALLEST) for last, next_one in pairs)


def topk_confident(confidence_BM: Tensor, open_BM: Tensor, ks: Sequence[int]) -> Tensor:
    """bool [B, M]: the `ks` largest of each row among the open slots; ties are broken by `topk`."""
    ranked_BM = confidence_BM.masked_fill(~open_BM, float("-inf"))
    commit_BM = torch.zeros_like(open_BM)
    if len(set(ks)) == 1:
        return commit_BM.scatter(1, ranked_BM.topk(ks[0]).indices, True)
    for row, k in enumerate(ks):
        commit_BM[row, ranked_BM[row].topk(k).indices] = True
    return commit_BM
