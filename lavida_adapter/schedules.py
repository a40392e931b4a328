"""How many masks each denoising step fills: evenly, along a time grid, by a named schedule, or by lot.

docs/lavida.md, "Schedules" and "Dream's decoding".
"""

import math

import torch
from torch import Tensor

from shirg import UserError

SCHEDULES = ("none", "shift", "cosine", "linear", "logit_normal", "time_grid")
"""`none` is what the language model's published sampler does without a schedule."""

EPS = 1e-3
"""Where the time grid ends."""


def tokens_per_step(
    n_masks: int, steps: int, schedule: str = "none", shift: float = 1 / 3, eps: float = EPS
) -> list[int]:
    """How many tokens each step commits. The counts sum to `n_masks`; a named schedule has no more steps than masks.

    `none` is even here. `shift` < 1 commits many tokens early, > 1 late. The reference's default is 3, its paper
    recommends 1/3. `eps` is the end of the time grid, whose first counts may be 0.

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
    if schedule == "time_grid":
        return grid_counts(n_masks, steps, eps)
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


def grid_shares(steps: int, eps: float = EPS) -> Tensor:
    """float32 [steps]: which share of the masks that are left each step of the time grid fills."""
    t = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    return 1 - t[1:] / t[:-1]


def grid_count(n_masks: int, share: Tensor) -> int:
    """The masks that a step with this share fills. In float32, since the product often lies next to an integer."""
    return int((torch.tensor(n_masks, dtype=torch.float32) * share).item())


def grid_counts(n_masks: int, steps: int, eps: float = EPS) -> list[int]:
    """The counts of a whole time grid; the last step fills what is left."""
    counts: list[int] = []
    for share in grid_shares(steps, eps)[:-1]:
        counts.append(grid_count(n_masks - sum(counts), share))
    return [*counts, n_masks - sum(counts)]


def drawn_counts(n_masks: int, steps: int, eps: float, generator: torch.Generator | None) -> list[int]:
    """Counts where every mask that is left is filled with the probability of the step's share; the last step fills all.

    The draws are made on the generator's device.
    """
    device = None if generator is None else generator.device
    left = n_masks
    counts: list[int] = []
    for share in grid_shares(steps, eps)[:-1].tolist():
        u = torch.rand(left, device=device, generator=generator)
        counts.append(int((u < share).sum()))
        left -= counts[-1]
    return [*counts, left]
