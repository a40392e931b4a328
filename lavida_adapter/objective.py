"""The training objective: options, noise levels, masks and cross entropy; and a process's shard of the batch.

docs/lavida.md, "Training objective". Some answer tokens are masked and predicted; a second copy of the example masks
the other ones. Random numbers are arguments, so that a test can pass those of the reference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.prompt import IGNORE
from shirg import UserError

TimeSampler = Literal["uniform", "logit_normal", "mode"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Options of the objective; the defaults are LaViDa's."""

    time: TimeSampler = "uniform"
    """How noise levels are drawn: uniform, a logistic of N(0, 1), or the "mode" sampler of Stable Diffusion 3."""
    complementary: bool = True
    """Each example twice: the second copy masks exactly the targets that the first one does not mask."""
    weighting: Literal["none", "inverse_time"] = "none"
    """"none": plain mean over targets (LaViDa); "inverse_time": each target over its masking probability (LLaDA)."""
    prefix_mask: bool = False
    """True: the prompt does not see the answer, as in decoding from the cache. False: it does, as in LaViDa."""
    extra_padding: int = 128
    """For half of the batches, up to this many end-of-text tokens are appended to the longest answer."""
    answer_tokens: int | None = None
    """Pads every answer with end-of-text to at least this length, the one at which answers are decoded."""
    alignment: float = 0.0
    """Weight of the contrastive loss between picture tokens and question words; 0: none."""
    adaptive_k: float = 0.0
    """Weight of the squared error of a selector's head that predicts the loss; 0: none."""

    def __post_init__(self) -> None:
        choices = {"time": ("uniform", "logit_normal", "mode"), "weighting": ("none", "inverse_time")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"objective.{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.extra_padding < 0:
            raise UserError(f"objective.extra_padding={self.extra_padding}: give 0 or more")
        for name in ("alignment", "adaptive_k"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"objective.{name}={getattr(self, name)}: give a weight >= 0")
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise UserError(f"objective.answer_tokens={self.answer_tokens}: give at least 1, or null")


@dataclass
class Tally:
    """Counts and terms of the last loss, for progress and curves."""

    tokens: int = 0
    """Positions of all rows, pictures included, counted once for both copies."""
    masked: float = 1.0
    """Masked targets of a process, the mean of all processes; 1 where all have none."""
    right: Tensor | None = None
    """How many of its masked targets the model predicts correctly in this process."""
    row_loss_B: Tensor | None = None
    """Mean cross entropy of each row's masked targets, if `adaptive_k` needs it."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """The auxiliary losses, without their weights."""


def sample_times(batch: int, sampler: TimeSampler, generator: torch.Generator, device: torch.device) -> Tensor:
    """Noise levels t in (0, 1), one per example."""
    if sampler == "logit_normal":
        return torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    u = torch.rand(batch, generator=generator, device=device)
    if sampler == "mode":  # Esser et al. 2024, arXiv 2403.03206, section 3.1, scale 1.29
        return 1 - u - 1.29 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
    return u


def extra_padding(config: ObjectiveConfig, generator: torch.Generator) -> int:
    """How many end-of-text tokens the longest row gets: uniform in [-limit, limit - 1], negative numbers give 0."""
    if config.extra_padding == 0:
        return 0
    limits = (-config.extra_padding, config.extra_padding)
    return max(0, int(torch.randint(*limits, (1,), generator=generator, device=generator.device)))


def mask_probability(t_B: Tensor) -> Tensor:
    """Probability [B] that a target is masked at noise level t, never 0 (docs/lavida.md, "Training objective")."""
    return 0.999 * t_B + 0.001


def masked_targets(
    target_BL: Tensor, t_B: Tensor, u_BL: Tensor, u_min_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The targets that a copy masks, and those that its complement masks, both bool [B, L].

    At least one position of each row is drawn. It need not be a target: then the complement masks all targets.
    `u_min_B`: minimum of the row's random numbers, if `u_BL` holds only part of the row.
    """
    u_min_B = u_BL.amin(-1) if u_min_B is None else u_min_B
    drawn_BL = u_BL <= torch.maximum(mask_probability(t_B), u_min_B)[:, None]
    return target_BL & drawn_BL, target_BL & ~drawn_BL


def masked_cross_entropy(
    logits_MW: Tensor, labels_M: Tensor, weight_M: Tensor | None = None, n_targets: float | None = None
) -> Tensor:
    """Cross entropy of the M masked targets in float32, without a label shift: their mean.

    With `weight_M` the sum is weighted; `n_targets` replaces M as the divisor. Without masked targets the loss is 0.
    """
    loss_M = F.cross_entropy(logits_MW.float(), labels_M, reduction="none")
    if weight_M is not None:
        loss_M = loss_M * weight_M
    return loss_M.sum() / (max(1, len(labels_M)) if n_targets is None else n_targets)


def pad_answers(
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    *,
    eos: int,
    extra: int,
    least: int = 0,
    agree: Callable[[int], int] = int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of equal length (without the picture) and their labels; all padding is an end-of-text target.

    The longest row grows by `extra`; every answer has at least `least` tokens. `agree` maps the length that these rows
    need to the length that they get, so that all processes use the same.
    """
    pairs = list(zip(prompts, answers, strict=True))
    length = agree(max(len(p) + max(len(a) + extra, least) for p, a in pairs))
    rows, labels = [], []
    for prompt, answer in pairs:
        tail = [*answer, *[eos] * (length - len(prompt) - len(answer))]
        rows.append([*prompt, *tail])
        labels.append([IGNORE] * len(prompt) + tail)
    return rows, labels


@dataclass(frozen=True)
class Shard:
    """A process's b rows of a global batch of world * b: rank * b .. (rank + 1) * b - 1.

    Numbers are reduced over the processes, and values gathered from them, with the CPU backend.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Self:
        """The shard of this process in torch's process group; the whole batch without one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def rows(self, drawn_G: Tensor) -> Tensor:
        """This process's rows of random numbers for the global batch."""
        b = len(drawn_G) // self.world
        return drawn_G[self.rank * b : (self.rank + 1) * b]

    def largest(self, n: int) -> int:
        """The largest `n` of all processes."""
        return n if self.world == 1 else int(self._reduce(n, dist.ReduceOp.MAX))

    def mean(self, n: int) -> float:
        """The mean `n` of all processes."""
        return n if self.world == 1 else float(self._reduce(n, dist.ReduceOp.SUM)) / self.world

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The values of all rows of the global batch, given those of this process's rows."""
        if self.world == 1:
            return list(mine)
        return [value for part in self._exchange(list(mine)) for value in part]

    def gather_vectors(self, mine_B: Tensor) -> Tensor:
        """Tensors [G, ...] of all rows of the global batch in float32, given those of this process's rows.

        What all processes compute from them alike has a gradient in each with respect to its own rows alone, times
        `world`: the mean of these gradients over the processes is that of one process with the whole batch.
        """
        mine_B = mine_B.float()
        if self.world == 1:
            return mine_B
        parts = [part.to(mine_B.device) for part in self._exchange(mine_B.detach().cpu())]
        parts[self.rank] = mine_B.detach() + self.world * (mine_B - mine_B.detach())
        return torch.cat(parts)

    def _exchange(self, mine: T) -> list[T]:
        """What each process gives, by its rank."""
        found: list[T] = [mine] * self.world
        dist.all_gather_object(found, mine)
        return found

    @staticmethod
    def _reduce(n: int, how: dist.ReduceOp.RedOpType) -> Tensor:
        number = torch.tensor(n)
        dist.all_reduce(number, how)
        return number


SINGLE = Shard()
"""The whole batch, in one process."""
