"""Stage "text": the language model learns to look things up, from word bags instead of picture tokens.

The stand-in for LLaDA's pretraining. Contexts grow from 6 to 64 cells; without that curriculum, or with a prompt that
is one bidirectional block, letters are not learned (docs/method.md, "The tiny testbed"). So this stage alone uses
image-first attention, and settles on the attention of the model as shipped in its last steps; the gate uses that one.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from experiments.data.synthetic.glyphs import Lookups, draw_lookups
from experiments.data.synthetic.glyphs.lookup import DIGIT
from experiments.data.synthetic.glyphs.vocabulary import CHARS, COLOURS
from experiments.data.tokenizer import glyph_tokens
from lavida_adapter import DecodeConfig, Lavida, ObjectiveConfig
from lavida_adapter.config import PrefixAttention
from lavida_adapter.module import OptimConfig, Trainable
from lavida_adapter.objective import pad_answers
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import prompt_ids, training_example


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Contexts of `first` cells, then a ramp, then `last` cells; about `tokens` cells per step throughout."""

    first: int = 6
    last: int = 64
    hold: float = 0.45
    ramp: float = 0.25
    settle: float = 0.15
    """Share of the steps, at the end, under the attention of the model as shipped."""
    tokens: int = 2500

    def __post_init__(self) -> None:
        if not 0 < self.ramp or min(self.hold, self.settle) < 0 or self.hold + self.ramp + self.settle > 1:
            raise ValueError(
                f"text: hold={self.hold}, ramp={self.ramp} and settle={self.settle} must add up to at most 1"
            )

    def cells(self, done: float) -> int:
        """Context length when a share `done` of the steps is behind us."""
        along = min(1.0, max(0.0, (done - self.hold) / self.ramp))
        return round(self.first + (self.last - self.first) * along)


class TextPretraining(Trainable):
    def __init__(
        self,
        model: Lavida,
        optim: OptimConfig,
        seed: int,
        objective: ObjectiveConfig,
        curriculum: Curriculum,
        prefix_attention: PrefixAttention,
        noise: float,
    ) -> None:
        super().__init__(model, optim, seed)
        self.objective = objective
        self.curriculum = curriculum
        self.noise = noise
        self.shipped = model.config
        self.teaching = replace(model.config, prefix_attention=prefix_attention)
        model.requires_grad_(False)
        model.lm.requires_grad_(True)
        words = glyph_tokens(model.tokenizer)
        self.char_ids, self.colour_ids = torch.tensor(words.char), torch.tensor(words.colour)

    def draw(self, step: int) -> Lookups:
        """The contexts of a step, the same in every run."""
        cells = self.curriculum.cells(step / self.optim.steps)
        batch = max(1, self.curriculum.tokens // (cells + 5))
        return draw_lookups(np.random.default_rng([self.seed, step]), batch=batch, cells=cells)

    def loss(self, batch: Lookups, generator: torch.Generator) -> Tensor:
        context = self.context(batch)
        context = context + self.noise * torch.randn(context.shape, generator=generator, device=context.device)
        examples = [training_example(self.model.tokenizer, q, a, self.model.config) for q, a in questions(batch)]
        rows, labels = pad_answers(
            [e.prompt for e in examples], [e.answer for e in examples], eos=self.model.config.lm.eos_token_id, extra=1
        )
        settling = self.global_step >= (1 - self.curriculum.settle) * self.optim.steps
        self.model.config = self.shipped if settling else self.teaching
        try:
            return self.model.loss_of_rows(rows, labels, list(context), self.objective, generator)
        finally:
            self.model.config = self.shipped

    def context(self, lookups: Lookups) -> Tensor:
        """Word bags [B, N, D]: the sum of a char's and a colour's embedding; a blank where there is neither."""
        char, colour = torch.from_numpy(lookups.char_BN), torch.from_numpy(lookups.colour_BN)
        wte = self.model.lm.wte
        bag = wte(self.char_ids[char]) + wte(self.colour_ids[colour]) * (colour > 0)[..., None]
        return bag

    @torch.no_grad()
    def gate(self, contexts: int = 256) -> dict[str, float]:
        """Exact match of digit and letter lookups at full length, under the attention of the shipped model."""
        scores = {}
        for task in ("digit", "letter"):
            rng = np.random.default_rng([self.seed, 10**9])
            lookups = draw_lookups(rng, batch=contexts, cells=self.curriculum.last, tasks=task)
            asked = questions(lookups)
            rows = [prompt_ids(self.model.tokenizer, question, self.model.config) for question, _ in asked]
            prefix, _ = splice(rows, list(self.context(lookups)), self.model.lm.wte, max_length=10**6)
            texts = self.model.generate(prefix, DecodeConfig(max_new_tokens=3)).texts
            scores[f"{task}s"] = sum(t == answer for t, (_, answer) in zip(texts, asked, strict=True)) / contexts
        return scores


def questions(lookups: Lookups) -> list[tuple[str, str]]:
    """Question and answer of each context, in the words of the picture task."""
    triples = zip(lookups.task_BG[:, 0], lookups.argument_BG[:, 0], lookups.answer_BG[:, 0], strict=True)
    return [
        (f"digit {COLOURS[argument]}", CHARS[answer])
        if task == DIGIT
        else (f"letter {CHARS[argument]}", COLOURS[answer])
        for task, argument, answer in triples
    ]
