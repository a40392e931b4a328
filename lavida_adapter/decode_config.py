"""How an answer is generated: the options of every language model, and which of them go together.

docs/lavida.md, "Denoising" and "Dream's decoding". What only one of the language models can do is checked by its
sampler (`lavida_adapter.sampling`, `lavida_adapter.dream_sampling`).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lavida_adapter.schedules import EPS, SCHEDULES
from shirg import UserError

Engine = Literal["eager", "compile", "graph"]
"""How steps run: kernel by kernel, compiled by torch, or replayed as a CUDA graph."""

REMASKING = {
    **{name: name for name in ("low_confidence", "margin", "entropy", "random", "origin")},
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
}
"""The rules; the last two are the names that the Dream publication uses."""

TopK = int | Literal["model"] | None


@dataclass(frozen=True)
class Rule:
    """Which tokens are candidates and which slots a step commits."""

    remasking: str = "low_confidence"
    temperature: float = 0.0
    threshold: float | None = None
    """Commits every slot with at least this probability, and one in any case, instead of a fixed number of slots."""
    top_p: float | None = None
    top_k: TopK = "model"
    alg_temp: float = 0.0


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
    """How many tokens each step commits. `none`: even for LLaDA, Dream's `time_grid` for Dream."""
    shift: float = 1 / 3
    eps: float = EPS
    """Where the time grid ends, above 0 and below 1: the larger, the more tokens are left to the last step."""
    remasking: str = "low_confidence"
    temperature: float = 0.0
    top_p: float | None = None
    """Candidates are the likeliest tokens up to this sum of probabilities. Dream only."""
    top_k: TopK = "model"
    """Candidates are this many likeliest tokens; None is all, "model" what the published sampler uses. Dream only."""
    alg_temp: float = 0.0
    """Above 0, slots are drawn from the softmax of confidence / alg_temp instead of taking the surest. Dream only."""
    prefix_cache: bool = True
    """False runs prompt and answer together at every step, like the reference without its prefix mode."""
    allow_mask_token: bool = False
    """True lets a step commit the mask token itself, which leaves the slot masked: the reference's behaviour."""
    parity: bool = False
    """True repeats the published sampler step by step, with its quirks (docs/lavida.md, "Dream's decoding")."""
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
        self._check_names()
        self._check_steps()
        self._check_numbers()
        self._check_threshold()
        self._check_origin()
        self._check_parity()
        if self.engine != "eager" and not self.prefix_cache:
            raise UserError(
                f"decode.engine={self.engine} runs steps over a prefix cache, and decode.prefix_cache=false has none: "
                "choose decode.engine=eager"
            )

    def _check_names(self) -> None:
        choices = {"engine": get_args(Engine), "schedule": SCHEDULES, "remasking": tuple(REMASKING)}
        for name, known in choices.items():
            given = getattr(self, name)
            if given not in known:
                raise UserError(f"decode.{name}={given!r}: choose one of {', '.join(known)}")

    def _check_steps(self) -> None:
        if self.block < 1 or self.max_new_tokens % self.block:
            raise UserError(
                f"decode.block_length={self.block} does not divide decode.max_new_tokens={self.max_new_tokens}: "
                "choose a divisor, or null for one block"
            )
        if self.step_ratio is not None and self.step_per_block is not None and not self.parity:
            raise UserError(
                "decode.step_ratio and decode.step_per_block both set the number of steps: give one of them"
            )
        if self.step_ratio is not None and not 0 < self.step_ratio <= 1:
            raise UserError(f"decode.step_ratio={self.step_ratio}: give a share of the block, above 0 and at most 1")
        if self.steps_per_block < 1 and not self.parity:
            raise UserError(
                f"decode: step_ratio={self.step_ratio}, step_per_block={self.step_per_block} leave no step for a block "
                f"of {self.block} tokens"
            )

    def _check_numbers(self) -> None:
        if not 0 < self.shift < math.inf:
            raise UserError(f"decode.shift={self.shift}: give a positive number")
        if not 0 < self.eps < 1:
            raise UserError(f"decode.eps={self.eps}: give the end of the time grid, above 0 and below 1")
        for name in ("temperature", "alg_temp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"decode.{name}={getattr(self, name)}: give 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"decode.top_p={self.top_p}: give a probability, above 0 and at most 1, or null")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if not (self.top_k is None or self.top_k == "model" or (whole and int(self.top_k) >= 1)):
            raise UserError(f"decode.top_k={self.top_k!r}: give a positive number, null for all tokens, or model")

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
        if self.rule.remasking != "low_confidence":
            raise UserError(
                f"decode.threshold is a probability, and decode.remasking={self.remasking} does not rank by it: "
                "choose low_confidence"
            )
        if self.alg_temp > 0:
            raise UserError(
                "decode.threshold commits every sure token, decode.alg_temp draws a number of them: give one of them"
            )

    def _check_origin(self) -> None:
        if self.rule.remasking in ("origin", "random") and self.alg_temp > 0:
            raise UserError(
                f"decode.alg_temp draws slots by their confidence, and decode.remasking={self.remasking} ranks by "
                "none: leave out alg_temp, or choose another rule"
            )
        if self.remasking == "origin" and self.schedule not in ("none", "time_grid"):
            raise UserError(
                f"decode.remasking=origin draws the number of tokens along the time grid, not by "
                f"decode.schedule={self.schedule}: leave out the schedule, or choose another rule"
            )

    def _check_parity(self) -> None:
        if not self.parity:
            return
        if not self.allow_mask_token:
            raise UserError(
                "decode.parity=true repeats the published sampler, which may commit the mask token: add "
                "decode.allow_mask_token=true, or choose decode=parity"
            )
        if self.threshold is not None or self.early_stop:
            raise UserError(
                "decode.parity=true repeats the published sampler, which has no threshold and no early_stop: leave "
                "them out, or use decode.parity=false"
            )

    @property
    def block(self) -> int:
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def grid_steps(self) -> int:
        """Steps per block before `step_ratio`."""
        return self.block if self.step_per_block is None else min(self.step_per_block, self.block)

    @property
    def steps_per_block(self) -> int:
        return self.grid_steps if self.step_ratio is None else int(self.block * self.step_ratio)

    @property
    def rule(self) -> Rule:
        """What a step needs to know, under our own name of the rule."""
        return Rule(REMASKING[self.remasking], self.temperature, self.threshold, self.top_p, self.top_k, self.alg_temp)

    @property
    def steps(self) -> int:
        """The most forwards that an answer can take."""
        return self.max_new_tokens // self.block * self.steps_per_block
