"""What a denoising step commits: a candidate for every slot, and the surest of them.

docs/lavida.md, "Denoising" and "Remasking". Shape letters: B batch, A answer slots, M slots that matter, W vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REMASKING = ("low_confidence", "margin", "entropy", "random")

TOLERANCE = 2e-5
"""Probabilities in float32 that are closer than this, as a share of the larger one, might rank otherwise in float64: an
exponential of -80 errs by 5e-6 of itself, a sum of 100,000 of them by a few 1e-7."""
SMALLEST = 1e-37
"""Below this float32 has no digits left to compare."""


@dataclass(frozen=True)
class Rule:
    """How a step chooses."""

    remasking: str = "low_confidence"
    temperature: float = 0.0
    threshold: float | None = None
    """Commit whatever is at least so probable, and one slot in any case, instead of a number of slots."""


@dataclass(frozen=True)
class Draw:
    """Random numbers as the reference draws them: for every slot of the answer, though only some of them matter."""

    generator: torch.Generator | None
    n_answer: int
    want_BM: Tensor | None
    """None: all slots matter."""

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
    """Candidates [B, M], and which of them are written: of each row the `ks` surest slots that are still open."""
    tokens_BM = candidates(logits_BMW, rule.temperature, draw)
    if rule.remasking == "random":
        return tokens_BM, topk_confident(draw.uniform(len(open_BM), open_BM.device), open_BM, ks)
    if rule.threshold is not None:
        sure_BM = confidence(logits_BMW, tokens_BM, rule.remasking)
        best_BM = topk_confident(sure_BM, open_BM, [1] * len(ks))
        return tokens_BM, open_BM & ((sure_BM >= rule.threshold) | best_BM)
    if min(ks) == open_BM.shape[1]:
        return tokens_BM, open_BM  # all that is left: nothing to rank
    # Looking at numbers makes a GPU wait, and there float64 costs little.
    if rule.remasking == "low_confidence" and open_BM.device.type == "cpu":
        quick_BM = confidence(logits_BMW, tokens_BM, rule.remasking, torch.float32)
        if is_clear(quick_BM, open_BM, ks):
            return tokens_BM, topk_confident(quick_BM, open_BM, ks)
    return tokens_BM, topk_confident(confidence(logits_BMW, tokens_BM, rule.remasking), open_BM, ks)


def candidates(logits_BMW: Tensor, temperature: float, draw: Draw) -> Tensor:
    """The likeliest token of every slot, or with a temperature the largest of exp(logit) / (-ln u)^T in float64."""
    if temperature == 0:
        return logits_BMW.max(-1).indices  # the first of equals, as argmax, which takes three times as long on a CPU
    u = draw.uniform(len(logits_BMW), logits_BMW.device, logits_BMW.shape[-1])
    return (logits_BMW.double().exp() / (-torch.log(u)) ** temperature).argmax(-1)


def confidence(logits_BMW: Tensor, tokens_BM: Tensor, remasking: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """How sure each candidate is [B, M]; read from the clean logits, whatever the temperature."""
    p = logits_BMW.to(dtype).softmax(-1)
    if remasking == "low_confidence":
        return p.gather(-1, tokens_BM[..., None])[..., 0]
    if remasking == "margin":
        top = p.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    return (p * torch.log(p + 1e-10)).sum(-1)


def is_clear(quick_BM: Tensor, open_BM: Tensor, ks: Sequence[int]) -> bool:
    """Whether the `ks` largest of each row would be the same in float64: the next one is well below them."""
    ranked = quick_BM.masked_fill(~open_BM, -1.0).sort(-1, descending=True).values.tolist()
    pairs = ((row[k - 1], row[k]) for row, k in zip(ranked, ks, strict=True) if 0 < k < len(row))
    return all((1 - TOLERANCE) * last > max(next_one, SMALLEST) for last, next_one in pairs)


def topk_confident(confidence_BM: Tensor, open_BM: Tensor, ks: Sequence[int]) -> Tensor:
    """bool [B, M]: the `ks` largest of each row; ties by the order of `topk`."""
    ranked_BM = confidence_BM.masked_fill(~open_BM, float("-inf"))
    commit_BM = torch.zeros_like(open_BM)
    if len(set(ks)) == 1:
        return commit_BM.scatter(1, ranked_BM.topk(ks[0]).indices, True)
    for row, k in enumerate(ks):
        commit_BM[row, ranked_BM[row].topk(k).indices] = True
    return commit_BM
