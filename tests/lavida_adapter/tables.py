"""Tables of logits whose right answers are known by hand, and a run of the denoising loop over them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.generate import denoise, start
from lavida_adapter.language_model import pick
from lavida_adapter.sampling import LogitsFn
from tests.lavida_adapter.tiny import noise

# Probabilities of tokens 0..4 at four positions; what each rule is surest of differs.
TABLE = torch.tensor(
    [
        [0.50, 0.49, 0.01, 0.00, 0.00],  # largest probability 0.50, margin 0.01, entropy 0.74
        [0.40, 0.15, 0.15, 0.15, 0.15],  # largest 0.40, margin 0.25, entropy 1.50
        [0.00, 0.46, 0.18, 0.18, 0.18],  # largest 0.46, margin 0.28, entropy 1.28
        [0.00, 0.00, 0.44, 0.39, 0.17],  # largest 0.44, margin 0.05, entropy 1.03
    ]
)
LOGITS = torch.cat([TABLE, torch.zeros(4, 1)], dim=1).clamp_min(1e-9).log()
"""[4, 6]; the last token, the mask, is impossible."""
W, MASK, EOS = 6, 5, 4


def table(ids_BA: Tensor) -> Tensor:
    """Logits [B, 4, W] that do not depend on what is written already; the mask token is impossible."""
    return LOGITS.expand(len(ids_BA), -1, -1)


def dependent(ids_BA: Tensor, seed: int = 0) -> Tensor:
    """Logits that depend on every token of their own row, and on nothing else."""
    embed, mix = noise(W, 16, seed=seed), noise(16, 16, seed=seed + 1)
    x = embed[ids_BA] + 0.3 * noise(64, 16, seed=seed + 2)[: ids_BA.shape[1]]
    logits = torch.tanh((x + x.mean(1, keepdim=True)) @ mix) @ noise(16, W, seed=seed + 3)
    logits[..., MASK] = -20
    return logits


def at(logits_of: Callable[[Tensor], Tensor]) -> LogitsFn:
    """Logits of the slots that are asked for, in a tensor of their own."""

    def asked(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        logits = logits_of(ids_BA)
        return logits.clone() if want_BM is None else pick(logits, want_BM)

    return asked


def run(logits_of: Any, batch: int = 1, draft: tuple[int, ...] = (), seed: int = 0, **knobs: Any) -> Any:
    config = DecodeConfig(keep_history=True, **knobs)
    ids = start(batch, config, MASK, [draft] * batch)
    found, forwards, steps, history = denoise(
        at(logits_of), ids, config, MASK, torch.Generator().manual_seed(seed), eos_id=EOS
    )
    assert max(steps, default=0) <= forwards
    return found, forwards, history


def committed(history: list[Tensor], row: int = 0) -> list[list[int]]:
    """Positions written at each step."""
    masked = [[True] * history[0].shape[1], *((h[row] == MASK).tolist() for h in history)]
    return [[i for i, (b, a) in enumerate(zip(x, y, strict=True)) if b and not a] for x, y in pairwise(masked)]
