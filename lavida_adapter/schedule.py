"""How many tokens each denoising step commits (docs/lavida.md, "Schedules").

Pure functions of (masks, steps); float32 on purpose, because truncation makes the last bit visible.
"""

import math

import torch
from torch import Tensor

SCHEDULES = ("none", "shift", "cosine", "linear", "logit_normal")


def tokens_per_step(n_masks: int, steps: int, schedule: str = "none", shift: float = 1 / 3) -> list[int]:
    """Counts that add up to `n_masks`, one per step; fewer steps than asked when there are fewer masks.

    `shift` < 1 commits many tokens early, > 1 late; the reference's own default is 3, the paper recommends 1/3.

    Raises:
        ValueError: for an unknown schedule, no steps, or a shift that is not positive.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"decode.schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if steps < 1:
        raise ValueError(f"decode: {steps} denoising steps per block; raise step_ratio or step_per_block")
    if n_masks == 0:
        return []
    if schedule == "none":
        base, extra = divmod(n_masks, steps)
        return [base + (i < extra) for i in range(steps)]
    steps = min(steps, n_masks)
    progress = _progress(torch.linspace(0, 1, steps + 1, dtype=torch.float32), schedule, shift)
    committed = (progress * n_masks).to(torch.int64)
    committed[-1] = n_masks  # some shifts end a rounding error below 1, which would leave a mask unfilled
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
    """Share of the masks that is gone at time t, before the reversal."""
    if schedule == "shift":
        if not 0 < shift < math.inf:
            raise ValueError(f"decode.shift={shift}: give a positive number")
        return shift * t / (1 + (shift - 1) * t)
    if schedule == "cosine":
        return 1 - 0.5 * (1 + torch.cos(torch.pi * t))
    if schedule == "logit_normal":
        return 0.5 * (1 + torch.erf(torch.logit(t) / 2**0.5))
    return t
