"""Two made prompts with picture rows, and what a cache selector should keep of them, computed slot by slot."""

from typing import Any

import torch
from torch import Tensor

from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.cache_compression.compressor import FirstStep
from shirg import Selection, Source
from tests.lavida_adapter.dense import may_see
from tests.lavida_adapter.tiny import noise, tiny_model

P, A, D = 14, 4, 32
N_VISUAL, N_TOKENS = (7, 5), (14, 11)
FAMILIES = ("llada", "dream")
MASK = torch.arange(P) < torch.tensor(N_TOKENS)[:, None]
VISUAL = (torch.arange(P) >= 3) & (torch.arange(P) < 3 + torch.tensor(N_VISUAL)[:, None])
DECODE = DecodeConfig(max_new_tokens=A)


def small(family: str = "llada", **changes: Any) -> Lavida:
    """Three layers with grouped keys."""
    return tiny_model(lm={"family": family, "n_layers": 3, "n_kv_heads": 2}, **changes)


def made_prefix(seed: int = 0) -> Prefix:
    """Two prompts of different lengths, with seven and five picture rows, of which the last is synthesised."""
    embeds = noise(2, P, D, seed=seed) * MASK[..., None]
    chosen = tuple(selection(n, noise(1, 9, seed=seed + b)) for b, n in enumerate(N_VISUAL))
    return Prefix(embeds, MASK, VISUAL, selections=chosen, n_matched=N_VISUAL)


def selection(n: int, scores: Tensor) -> Selection:
    index = torch.tensor([[*range(n - 1), -1, -1]])
    source = torch.where(index < 0, int(Source.SUMMARY), int(Source.KEPT))
    mask = torch.arange(n + 1)[None] < n
    return Selection(torch.zeros(1, n + 1, D), index, source, torch.zeros(1, n + 1, 4), mask, scores)


def alone(prefix: Prefix, b: int) -> Prefix:
    n, one = N_TOKENS[b], slice(b, b + 1)
    return Prefix(
        prefix.embeds_BPD[one, :n],
        MASK[one, :n],
        VISUAL[one, :n],
        selections=prefix.selections[one],
        n_matched=N_VISUAL[one],
    )


def first_step(seed: int = 7) -> FirstStep:
    attention_BAP = noise(2, A, P, seed=seed).softmax(-1)
    open_BA = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    return FirstStep(attention_BAP, torch.ones_like(open_BA), open_BA, torch.zeros(2, A, 10))


def best(scores: list[float], b: int, k: int) -> list[int]:
    """The k best picture slots of a row, the first one where scores are equal, in reading order."""
    slots = [p for p in range(P) if VISUAL[b, p]]
    return sorted(sorted(slots, key=lambda p: (-scores[p], p))[:k])


def kept_slots(kept_BP: Tensor, b: int) -> list[int]:
    return [p for p in range(P) if kept_BP[b, p] and VISUAL[b, p]]


def row_and_mask(prefix: Prefix, b: int, answer: Tensor, image_first: bool, hidden: list[int]) -> tuple[Tensor, Tensor]:
    """One prompt with its answer, and what may see what: the answer everything but `hidden`."""
    n = N_TOKENS[b]
    allowed = may_see(n, len(answer), VISUAL[b] if image_first else None, prompt_sees_answer=False)
    allowed[n:, hidden] = False
    return torch.cat([prefix.embeds_BPD[b, :n], answer]), allowed
