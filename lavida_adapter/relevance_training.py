"""Training of a relevance head with the model's own answers: `train.py stage=gate`.

docs/method.md, "Learned relevance". A step draws several random subsets of tokens for each question, measures the loss
of the answer with each of them in a forward pass, and fits the head to what was seen. The objective
"straight_through" instead sends the gradient of one loss back through the language model to the membership of tokens.

Shape letters: B questions, M subsets of each, R = B * M rows of a forward pass, N source tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lavida_adapter.encode import PictureEncoder, PicturePrompts
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.lightning_module import LavidaModule, OptimConfig
from lavida_adapter.loss import TrainBatch, answer_losses, rows_alone
from lavida_adapter.model import Lavida
from lavida_adapter.objective import ObjectiveConfig, Shard, Tally
from lavida_adapter.relevance import RelevanceContext
from lavida_adapter.straight_through import competing, straight_through_loss
from lavida_adapter.timing import NoTimer
from lavida_adapter.vision import in_own_dtype
from shirg import Selection, Selector, Source, UserError, VisionFeatures, send
from shirg.relevance_head import standardised
from shirg.subset_losses import (
    Odds,
    answer_probabilities,
    gumbel,
    mil_loss,
    regression_loss,
    subset_shares,
    subset_sums,
)

SubsetLoss = Literal["subset_regression", "subset_mil", "joint", "straight_through"]

_DRAWN: tuple[SubsetLoss, ...] = ("subset_regression", "subset_mil", "joint")
_READ_BY: dict[str, tuple[SubsetLoss, ...]] = {
    **dict.fromkeys(("per_question", "tilt", "explore"), _DRAWN),
    "regression": ("joint",),
    "softness": ("straight_through",),
}
"""The losses that read an option."""


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """What a relevance head is fitted to, and which subsets it sees."""

    loss: SubsetLoss
    per_question: int = 4
    """M, the subsets of each question."""
    tilt: float = 0.0
    """At the last step, how much a token's standardised score counts beside Gumbel noise; from 0 along a line."""
    explore: float = 0.25
    """Share of the steps, at the start, without a tilt."""
    regression: float = 0.2
    """Weight of the regression in "joint"."""
    softness: float = 0.5
    """For "straight_through": standard deviations of the score over which membership fades in the backward pass."""

    def __post_init__(self) -> None:
        if self.loss not in get_args(SubsetLoss):
            raise UserError(f"objective.subsets.loss={self.loss!r}: choose one of {', '.join(get_args(SubsetLoss))}")
        if not 2 <= self.per_question <= 64:
            raise UserError(f"objective.subsets.per_question={self.per_question}: give 2 to 64 subsets to compare")
        if not 0 <= self.explore <= 1:
            raise UserError(f"objective.subsets.explore={self.explore}: give a share of the steps in [0, 1]")
        for name in ("tilt", "regression"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"objective.subsets.{name}={getattr(self, name)}: give a number >= 0")
        if not 0 < self.softness < math.inf:
            raise UserError(f"objective.subsets.softness={self.softness}: give a number above 0")
        for name, losses in _READ_BY.items():
            if self.loss not in losses and getattr(self, name) != getattr(SubsetConfig, name):
                raise UserError(
                    f"objective.subsets.{name} has no effect with objective={self.loss}: leave it at its default"
                )

    def tilt_at(self, done: float) -> float:
        """The tilt after a share `done` of the steps."""
        return self.tilt * max(0.0, done - self.explore) / max(1e-9, 1 - self.explore)


class Explored:
    """A learned relevance with noise, so that a selector's best K by it are a random subset; keeps what it computed.

    The noise of a row depends on seed and row alone, so that it does not matter how many processes share a batch.
    """

    def __init__(self, learned: Learned, ids: list[str], tilt: float, seed: int, first_row: int, copies: int) -> None:
        """`ids`: of the B questions; the prompts that reach it are called 0 to R - 1, copy by copy."""
        self.learned, self.ids, self.tilt, self.seed = learned, ids, tilt, seed
        self.first_row, self.copies = first_row, copies
        self.space, self.reads_question = learned.space, True
        self.scores: dict[int, Tensor] = {}
        """Scores [N] of each row, with a graph."""
        self.competing: dict[int, Tensor] = {}
        """bool [N]: the tokens of the finest views that are not padding."""
        self.asked: dict[int, Tensor] = {}
        """Question vector [W] of each row."""

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        rows, b = [int(name) for name in features.ids], len(self.ids)
        named = replace(features, ids=tuple(self.ids[row % b] for row in rows))
        with torch.enable_grad():
            scores_RN = self.learned(named, context)
            self.scores |= dict(zip(rows, scores_RN, strict=True))
        competing_RN = competing(features)
        noise_RN = send(torch.stack([self._noise(row, scores_RN.shape[1]) for row in rows]), scores_RN.device)
        self.competing |= dict(zip(rows, competing_RN, strict=True))
        self.asked |= dict(zip(rows, self.learned.asked(context), strict=True))
        return self.tilt * standardised(scores_RN.detach(), competing_RN) + noise_RN

    def _noise(self, row: int, n: int) -> Tensor:
        copy, question = divmod(row, len(self.ids))
        place = (self.first_row + question) * self.copies + copy
        return gumbel((n,), torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63))


def membership(selection: Selection, n: int) -> Tensor:
    """bool [n]: the source tokens that a selection (B = 1) keeps as they are."""
    kept_T = selection.mask_BT[0] & (selection.source_BT[0] == Source.KEPT)
    # Slots that keep nothing write to a place behind the last token, which is cut off.
    at_T = torch.where(kept_T, selection.index_BT[0], n)
    return torch.zeros(n + 1, dtype=torch.bool, device=at_T.device).index_fill(0, at_T, True)[:n]


@dataclass(frozen=True)
class Seen:
    """What a step saw: M subsets of each of B questions, and the loss with each. Rows of one layout have one N."""

    score_BN: Tensor
    competing_BN: Tensor
    member_BMN: Tensor
    loss_BM: Tensor
    asked_BW: Tensor


def see(
    model: Lavida,
    batch: TrainBatch,
    selector: Selector,
    learned: Learned,
    config: SubsetConfig,
    *,
    tilt: float,
    seed: int,
    least: int,
    shard: Shard,
) -> list[Seen]:
    """Draws the subsets and measures the losses: one entry for each number of source tokens in the batch.

    `least`: answers are padded to so many tokens, each for itself.

    Raises:
        UserError: for a selector that merges tokens, of which none is in or out.
    """
    b, m = len(batch.questions), config.per_question
    explored = Explored(learned, list(batch.ids), tilt, seed, shard.rank * b, m)
    boxes = None if batch.boxes is None else list(batch.boxes) * m
    rows = [str(row) for row in range(b * m)]
    prompts = PicturePrompts(list(batch.images) * m, list(batch.questions) * m, rows, boxes)
    with torch.no_grad():
        blocks, selections = PictureEncoder(model, selector, explored, NoTimer()).blocks(prompts)
        merged = [(chosen.mask_BT & (chosen.source_BT == Source.MERGED)).flatten() for chosen in selections]
        if bool(torch.cat(merged).any()):
            raise UserError(f"stage=gate needs tokens that are in or out, and {type(selector).__name__} merges some")
        texts, labels = rows_alone(model, batch, least=least)
        loss_BM = answer_losses(model, texts * m, labels * m, blocks).view(m, b).T
    sizes = [len(explored.scores[i]) for i in range(b)]
    found = []
    for n in sorted(set(sizes)):
        at = [i for i in range(b) if sizes[i] == n]
        members = [torch.stack([membership(selections[i + c * b], n) for c in range(m)]) for i in at]
        picked = ([known[i] for i in at] for known in (explored.scores, explored.competing, explored.asked))
        score_BN, competing_BN, asked_BW = (torch.stack(values) for values in picked)
        found.append(Seen(score_BN, competing_BN, torch.stack(members), loss_BM[at], asked_BW))
    return found


class RelevanceTraining(LavidaModule):
    """Trains the head of a learned relevance, alone or beside a LoRA that is trained on what the head selects."""

    def __init__(
        self,
        model: Lavida,
        selector: Selector,
        learned: Learned,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        seed: int,
        *,
        subsets: SubsetConfig,
    ) -> None:
        if not selector.uses_relevance:
            raise UserError(f"stage=gate trains a relevance, and {type(selector).__name__} ranks by none")
        super().__init__(model, selector, learned, objective, optim, seed)
        self.learned, self.subsets = learned, subsets
        self.adapts = any(p.requires_grad for part in (model, selector) for p in part.parameters())
        """Whether a LoRA is trained, too."""
        self.relevance_head = learned.head
        uses_odds = subsets.loss in ("subset_mil", "joint")
        odds = Odds(words=model.config.lm.d_model) if uses_odds else None
        self.odds = None if odds is None else odds.to(model.device)

    def loss(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        with self.precision():
            if self.subsets.loss == "straight_through":
                loss = self.model.enter(
                    straight_through_loss,
                    self.model,
                    batch,
                    self.selector,
                    self.learned,
                    self.subsets.softness,
                    least=self.objective.answer_tokens or 0,
                )
            else:
                loss = self._subset_loss(batch)
        self.tally = Tally()
        self.log("loss_relevance", loss.detach(), batch_size=1, sync_dist=True)
        return loss + super().loss(batch, generator) if self.adapts else loss

    def _subset_loss(self, batch: TrainBatch) -> Tensor:
        tilt = self.subsets.tilt_at(self.global_step / self.optim.steps)
        seed = self.seed * 1_000_003 + self.global_step
        shard, total = Shard.here(), torch.zeros((), device=self.model.device)
        least = self.objective.answer_tokens or 0
        given = (self.model, batch, self.selector, self.learned, self.subsets)
        for seen in self.model.enter(see, *given, tilt=tilt, seed=seed, least=least, shard=shard):
            total = total + subset_loss(seen, self.subsets, self.odds) * len(seen.score_BN) / len(batch.questions)
        return total


def subset_loss(seen: Seen, config: SubsetConfig, odds: Odds | None) -> Tensor:
    """The loss of the head for what a step saw; `odds` belong to "subset_mil" and "joint"."""
    # In float32: autocast would round the odds, and CUDA's refuses a cross entropy of probabilities.
    with in_own_dtype(seen.loss_BM.device):
        observed_BM = seen.loss_BM.float()
        if odds is None:
            return regression_loss(subset_sums(seen.score_BN, seen.member_BMN), observed_BM)
        share_BM = subset_shares(seen.score_BN, seen.member_BMN, seen.competing_BN)
        p_BM = answer_probabilities(share_BM, odds(seen.asked_BW))
        loss = mil_loss(p_BM, observed_BM)
        if config.loss == "joint":
            # Where an answer is never probable, its probability differs little between subsets, and its logarithm does.
            loss = loss + config.regression * regression_loss(p_BM.log(), observed_BM)
        return loss
