"""LLaDA's sampler: candidates, confidence, and which slots a step commits; and what a sampler is.

docs/lavida.md, "Denoising" and "Remasking". Confidence is compared in float64, as in the reference.

Shape letters: B batch, A answer slots, M slots whose logits a step computes, W vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lavida_adapter.decode_config import DecodeConfig, Rule
from lavida_adapter.schedules import EPS
from shirg import UserError, send
from shirg.kernels import usable

LogitsFn = Callable[[Tensor, Tensor | None], Tensor]
"""Answer ids [B, A] and the wanted slots [B, M] (None: all) -> logits [B, M, W]. The loop may write to the result."""

Denoised = tuple[Tensor, int, list[int], list[Tensor]]
"""Ids [B, A], the number of forwards in all and for each row, and the answer after every step when asked for."""


@dataclass(frozen=True)
class Draw:
    """Random numbers as the reference draws them: for every slot of the answer, even if only some are wanted."""

    generator: torch.Generator | None
    n_answer: int
    want_BM: Tensor | None
    """The wanted slots; None: all."""

    def of_row(self, i: int) -> "Draw":
        """The next numbers, for one answer of the batch."""
        return replace(self, want_BM=None if self.want_BM is None else self.want_BM[i : i + 1])

    def uniform(self, batch: int, device: torch.device, width: int | None = None) -> Tensor:
        """[B, M] or [B, M, W] in float64."""
        shape = (batch, self.n_answer) if width is None else (batch, self.n_answer, width)
        u = torch.rand(shape, dtype=torch.float64, device=device, generator=self.generator)
        if self.want_BM is None:
            return u
        if width is None:
            return u.gather(1, self.want_BM)
        return u.gather(1, self.want_BM[..., None].expand(-1, -1, width))


@dataclass(frozen=True)
class Sampler:
    """What the published samplers of the language models do differently."""

    schedule: str
    """How many tokens a step commits where no schedule is given: a name of `tokens_per_step`."""
    check: Callable[[DecodeConfig], None]
    """Raises UserError for options that this sampler does not have."""
    commit: Callable[[Tensor, Tensor, Sequence[int], Rule, Draw], tuple[Tensor, Tensor]]
    """Logits [B, M, W], open slots [B, M], a number of tokens for each row -> candidates and which are committed
    [B, M]."""
    published: Callable[[LogitsFn, Tensor, DecodeConfig, int, torch.Generator | None], Denoised] | None = None
    """The loop of `decode.parity=true`, where ours cannot repeat it."""


def check_llada(config: DecodeConfig) -> None:
    """Raises UserError for what LLaDA's sampler does not have."""
    for name, unused in (("top_p", (None,)), ("top_k", (None, "model")), ("alg_temp", (0,))):
        if getattr(config, name) not in unused:
            raise UserError(
                f"decode.{name}={getattr(config, name)} belongs to Dream's sampler, and this language model is a "
                "LLaDA: leave it out"
            )
    check_eps(config, on_grid=config.schedule == "time_grid" or config.remasking == "origin")
    if not config.parity:
        return
    if config.schedule == "time_grid" or config.remasking == "origin":
        raise UserError(
            f"decode.parity=true repeats LLaDA's published sampler, which has no schedule={config.schedule} with "
            f"remasking={config.remasking}: choose others, or decode.parity=false"
        )
    if config.steps_per_block < 1 or None not in (config.step_ratio, config.step_per_block):
        raise UserError(
            f"decode: LLaDA's published sampler cannot run step_ratio={config.step_ratio} with "
            f"step_per_block={config.step_per_block}: give one of them, with at least one step"
        )


def check_eps(config: DecodeConfig, *, on_grid: bool) -> None:
    """Raises UserError for an end of the time grid where no time grid is used."""
    if config.eps != EPS and not on_grid:
        raise UserError(
            f"decode.eps={config.eps} ends the time grid, and the number of tokens per step does not come from it "
            "here: leave out eps, or choose decode.schedule=time_grid"
        )


TOLERANCE = 2e-5
"""Two float32 probabilities closer than this (relative to the larger) might rank differently in float64: exp(-80) has a
relative error of 5e-6, a sum of 100,000 exponentials one of a few 1e-7."""
SMALLEST = 1e-37
"""Below this value float32 has no significant digits left."""


def commit_tokens(
    logits_BMW: Tensor, open_BM: Tensor, ks: Sequence[int], rule: Rule, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Candidates [B, M], and which are committed [B, M]: in each row the `ks` most confident of the open slots."""
    is_plain = rule.temperature == 0 and rule.remasking == "low_confidence" and min(ks) < open_BM.shape[1]
    if is_plain and logits_BMW.is_cuda and usable(logits_BMW.device):
        tokens_BM, sure_BM = likeliest(logits_BMW)
        return tokens_BM, _surest(sure_BM, open_BM, ks, rule)
    tokens_BM = candidates(logits_BMW, rule.temperature, draw)
    if rule.remasking in ("random", "origin"):
        return tokens_BM, topk_confident(draw.uniform(len(open_BM), open_BM.device), open_BM, ks)
    if rule.threshold is not None:
        return tokens_BM, _surest(confidence(logits_BMW, tokens_BM, rule.remasking), open_BM, ks, rule)
    if min(ks) == open_BM.shape[1]:
        return tokens_BM, open_BM  # all remaining slots: no ranking needed
    # On a CPU float32 is faster and usually ranks the same. On a GPU the check would force a synchronisation.
    if rule.remasking == "low_confidence" and open_BM.device.type == "cpu":
        quick_BM = confidence(logits_BMW, tokens_BM, rule.remasking, torch.float32)
        if is_clear(quick_BM, open_BM, ks):
            return tokens_BM, topk_confident(quick_BM, open_BM, ks)
    return tokens_BM, topk_confident(confidence(logits_BMW, tokens_BM, rule.remasking), open_BM, ks)


def _surest(sure_BM: Tensor, open_BM: Tensor, ks: Sequence[int], rule: Rule) -> Tensor:
    """bool [B, M]: the `ks` most confident open slots of each row, or with a threshold all above it and the best."""
    if rule.threshold is None:
        return topk_confident(sure_BM, open_BM, ks)
    return open_BM & ((sure_BM >= rule.threshold) | topk_confident(sure_BM, open_BM, [1] * len(ks)))


WIDE = 4096
"""Logits that a program of the kernel reads at a time."""


def likeliest(logits_BMW: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the largest logits, int64 [B, M], and its softmax, float64 [B, M], by a kernel that reads once.

    In torch this takes several passes over the vocabulary in float64, on a GPU a tenth of a denoising step.
    """
    from lavida_adapter.step_triton import likeliest_kernel  # Triton is optional

    rows_RW = logits_BMW.flatten(0, 1)
    rows_RW = rows_RW if rows_RW.stride(1) == 1 else rows_RW.contiguous()
    (n, width), device = rows_RW.shape, logits_BMW.device
    token_R = torch.empty(n, dtype=torch.int64, device=device)
    probability_R = torch.empty(n, dtype=torch.float64, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches on the current device
        likeliest_kernel[(n,)](rows_RW, token_R, probability_R, rows_RW.stride(0), width, WIDE=WIDE, num_warps=8)
    return token_R.view(logits_BMW.shape[:2]), probability_R.view(logits_BMW.shape[:2])


def candidates(logits_BMW: Tensor, temperature: float, draw: Draw) -> Tensor:
    """The most likely token of every slot; with a temperature T the argmax of exp(logit) / (-ln u)^T in float64."""
    if temperature == 0:
        return logits_BMW.max(-1).indices  # ties as in argmax, three times faster on a CPU
    rows = []
    for i, logits_1MW in enumerate(logits_BMW.split(1)):
        u_1MW = draw.of_row(i).uniform(1, logits_BMW.device, logits_BMW.shape[-1])
        rows.append((logits_1MW.double().exp() / (-torch.log(u_1MW)) ** temperature).argmax(-1))
    return torch.cat(rows)


def confidence(logits_BMW: Tensor, tokens_BM: Tensor, remasking: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Confidence in each candidate [B, M], from the logits without temperature."""
    # One answer at a time: in float64 the logits of a batch take gigabytes.
    pairs = zip(logits_BMW, tokens_BM, strict=True)
    return torch.stack([_confidence(row_MW.to(dtype).softmax(-1), tokens_M, remasking) for row_MW, tokens_M in pairs])


def _confidence(p_MW: Tensor, tokens_M: Tensor, remasking: str) -> Tensor:
    if remasking == "low_confidence":
        return p_MW.gather(-1, tokens_M[:, None])[:, 0]
    if remasking == "margin":
        top = p_MW.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    return (p_MW * torch.log(p_MW + 1e-10)).sum(-1)


def is_clear(quick_BM: Tensor, open_BM: Tensor, ks: Sequence[int]) -> bool:
    """Whether the `ks` largest of each row are the same in float64 for certain: the next one is well below them."""
    ranked = quick_BM.masked_fill(~open_BM, -1.0).sort(-1, descending=True).values.tolist()
    pairs = ((row[k - 1], row[k]) for row, k in zip(ranked, ks, strict=True) if 0 < k < len(row))
    return all((1 - TOLERANCE) * last > max(next_one, SMALLEST) for last, next_one in pairs)


def topk_confident(confidence_BM: Tensor, open_BM: Tensor, ks: Sequence[int]) -> Tensor:
    """bool [B, M]: the `ks` largest of each row among the open slots; of equal ones the first, as `topk` on a GPU."""
    ranked_BM = confidence_BM.masked_fill(~open_BM, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    place_M = torch.arange(open_BM.shape[1], device=open_BM.device)
    if len(set(ks)) == 1:
        taken_BM = (place_M < ks[0]).expand_as(open_BM)
    else:
        taken_BM = place_M < send(torch.tensor(ks), open_BM.device)[:, None]
    return torch.zeros_like(open_BM).scatter(1, ranked_BM, taken_BM)


LLADA_SAMPLER = Sampler("none", check_llada, commit_tokens)
