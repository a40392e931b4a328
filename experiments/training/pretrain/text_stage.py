"""Stage "text": the language model learns look-ups. In place of a picture token it reads a bag of words.

It replaces LLaDA's pretraining for the tiny model. In a bag, words are their embeddings (`codes=words`), or vectors of
a table that shares nothing with the embeddings (`codes=random`), as if the projector had a space of its own.

Contexts grow from 6 to 64 cells. Without that curriculum, or with
bidirectional attention over the whole prompt, the look-up of letters is not learned (docs/method.md, "The tiny
testbed"). So this stage trains with image-first attention, and with the attention of the shipped model in its last
steps; the gate uses the latter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data.synthetic.board import generator as seeded
from experiments.data.synthetic.glyphs import Lookups, draw_lookups
from experiments.data.synthetic.glyphs.questions import DIGIT
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS
from experiments.data.synthetic.mixture import FAMILIES
from experiments.data.synthetic.text_context import TextContext, draw_contexts
from experiments.data.synthetic.tokenizer import glyph_tokens, word_tokens
from lavida_adapter import DecodeConfig, Lavida, ObjectiveConfig
from lavida_adapter.config import PrefixAttention
from lavida_adapter.lightning_module import OptimConfig, Trainable
from lavida_adapter.loss import rows_loss
from lavida_adapter.objective import pad_answers
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import prompt_ids, training_example
from shirg import UserError

CODES_SEED = 20261126
"""Of the random table: a constant, so that no two stages can differ in it."""
ANSWER = 3
"""Slots of an answer: two characters and an end."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Contexts have `first` cells for a share `hold` of the steps, then more along a ramp, then `last` cells."""

    first: int = 6
    last: int = 64
    hold: float = 0.5
    ramp: float = 0.2
    settle: float = 0.15
    """Share of the steps, at the end, with the attention of the shipped model."""
    tokens: int = 2500
    """Cells per step, about, while contexts have `first` cells."""
    growth: float = 1.6
    """Cells per step at the end, divided by those at the start: long contexts have far fewer questions per cell."""
    alone: float = 0.2
    """Share of the steps, at the start, with glyph contexts alone: one task is learned sooner than several."""
    glyphs: float = 0.5
    """Share of glyph contexts after that; the families share the rest."""
    words: float = 0.0
    """Share of the steps, at the start, with embeddings in place of random codes."""
    fade: float = 0.0
    """Share of the steps, after those, in which embeddings give way to codes: a look-up follows a slow change; after a
    sudden one some letters are never found again."""
    families: Mapping[str, int] = field(default_factory=lambda: {"chart": 1, "shapes": 1})

    def __post_init__(self) -> None:
        if not 0 < self.ramp or min(self.hold, self.settle) < 0 or self.hold + self.ramp + self.settle > 1:
            raise UserError(
                f"text: hold={self.hold}, ramp={self.ramp} and settle={self.settle} must add up to at most 1"
            )

        if not 0 < self.first < self.last:
            raise UserError(f"text: first={self.first} and last={self.last}: contexts grow, give 0 < first < last")

    def cells(self, done: float) -> int:
        """Context length after a share `done` of the steps."""
        along = min(1.0, max(0.0, (done - self.hold) / self.ramp))
        return round(self.first + (self.last - self.first) * along)

    def coded(self, done: float) -> float:
        """Share of the codes in an entry, the rest being embeddings, after a share `done` of the steps."""
        return min(1.0, max(0.0, (done - self.words) / self.fade)) if self.fade else float(done >= self.words)

    def counts(self, done: float) -> dict[str, int]:
        """Contexts per step, by family, after a share `done` of the steps."""
        cells = self.cells(done)
        along = (cells - self.first) / (self.last - self.first)
        total = max(1, int(self.tokens * (1 + (self.growth - 1) * along)) // (cells + 5))
        glyphs = max(1, round(total * self.glyphs)) if self.families and done >= self.alone else total
        rest, whole = total - glyphs, sum(self.families.values())
        return {"glyphs": glyphs} | {name: rest * share // whole for name, share in self.families.items()}


@dataclass(frozen=True)
class Bags:
    """Contexts as word bags, with a question about each."""

    word_BNW: Tensor
    """int64 token ids of the words in each cell; padded with -1."""
    asked: Sequence[tuple[str, str]]
    """Question and answer."""


class TextPretraining(Trainable):
    """Trains the language model alone; `noise` is the standard deviation added to the word bags."""

    def __init__(
        self,
        model: Lavida,
        optim: OptimConfig,
        seed: int,
        objective: ObjectiveConfig,
        curriculum: Curriculum,
        prefix_attention: PrefixAttention,
        noise: float,
        codes: str = "words",
    ) -> None:
        super().__init__(model, optim, seed)
        self.objective = objective
        self.codes_VD = random_codes(model) if codes == "random" else None
        self.curriculum = curriculum
        self.noise = noise
        self.shipped = model.config
        self.teaching = replace(model.config, prefix_attention=prefix_attention)
        model.requires_grad_(False)
        model.lm.requires_grad_(True)
        self.words = glyph_tokens(model.tokenizer)
        self.ids = word_tokens(model.tokenizer)

    def draw(self, step: int) -> Bags:
        """The contexts of a step, the same in every run."""
        done = step / self.optim.steps
        cells, counts = self.curriculum.cells(done), self.curriculum.counts(done)
        lookups = draw_lookups(np.random.default_rng([self.seed, step]), batch=counts.pop("glyphs"), cells=cells)
        rng = seeded("text", self.seed, step)
        contexts = [c for name, n in counts.items() for c in draw_contexts(rng, FAMILIES[name], n=n, cells=cells)]
        parts = [self.glyph_bags(lookups), *([self.family_bags(contexts)] if contexts else [])]
        width = max(part.word_BNW.shape[-1] for part in parts)
        padded = [F.pad(part.word_BNW, (0, width - part.word_BNW.shape[-1]), value=-1) for part in parts]
        return Bags(torch.cat(padded), [pair for part in parts for pair in part.asked])

    def loss(self, batch: Bags, generator: torch.Generator) -> Tensor:
        context = self.context(batch.word_BNW, self.curriculum.coded(self.global_step / self.optim.steps))
        context = context + self.noise * torch.randn(context.shape, generator=generator, device=context.device)
        examples = [training_example(self.model.tokenizer, q, a, self.model.config) for q, a in batch.asked]
        rows, labels = pad_answers(
            [e.prompt for e in examples],
            [e.answer for e in examples],
            eos=self.model.config.lm.eos_token_id,
            extra=0,
            least=ANSWER,
        )
        settling = self.global_step >= (1 - self.curriculum.settle) * self.optim.steps
        self.model.config = self.shipped if settling else self.teaching
        try:
            return rows_loss(self.model, rows, labels, list(context), self.objective, generator)
        finally:
            self.model.config = self.shipped

    def context(self, word_BNW: Tensor, coded: float = 1.0) -> Tensor:
        """Word bags [B, N, D]: the sum of the words' embeddings, or with a share `coded` of their codes."""
        there, ids = (word_BNW >= 0)[..., None], word_BNW.clamp_min(0)
        word_BNWD = self.model.lm.embedding(ids)
        if self.codes_VD is not None:
            word_BNWD = torch.lerp(word_BNWD, F.embedding(ids, self.codes_VD), coded)
        return (word_BNWD * there).sum(dim=2)

    def glyph_bags(self, lookups: Lookups) -> Bags:
        """The char and the colour in each cell, a grey char alone, or a blank."""
        char_BN, colour_BN = torch.from_numpy(lookups.char_BN), torch.from_numpy(lookups.colour_BN)
        colours = torch.tensor([-1, *self.words.colour[1:]])[colour_BN]
        return Bags(torch.stack([torch.tensor(self.words.char)[char_BN], colours], dim=-1), questions(lookups))

    def family_bags(self, contexts: Sequence[TextContext]) -> Bags:
        """The words of the stamp in each cell, or a blank."""
        width = max(1, *(len(bag) for context in contexts for bag in context.bags))
        rows = [[[self.ids[word] for word in bag] or [self.words.blank] for bag in c.bags] for c in contexts]
        padded = [[bag + [-1] * (width - len(bag)) for bag in row] for row in rows]
        return Bags(torch.tensor(padded), [(c.question, c.answer) for c in contexts])

    @torch.no_grad()
    def gate(self, contexts: int = 256) -> dict[str, float]:
        """Exact match of each kind of look-up at full length, with the attention of the shipped model."""
        cells = self.curriculum.last
        scores = {}
        for task in ("digit", "letter"):
            rng = np.random.default_rng([self.seed, 10**9])
            lookups = draw_lookups(rng, batch=contexts, cells=cells, tasks=task)
            scores[f"{task}s"] = self._right(self.glyph_bags(lookups))
        for name in self.curriculum.families:
            drawn = draw_contexts(seeded("text gate", self.seed), FAMILIES[name], n=contexts, cells=cells)
            scores[name] = self._right(self.family_bags(drawn))
        return scores

    def _right(self, bags: Bags) -> float:
        """Share of the questions that the model answers right."""
        rows = [prompt_ids(self.model.tokenizer, question, self.model.config) for question, _ in bags.asked]
        prefix, _ = splice(rows, list(self.context(bags.word_BNW)), self.model.lm.embedding, max_length=10**6)
        texts = self.model.generate(prefix, DecodeConfig(max_new_tokens=ANSWER)).texts
        return sum(t == answer for t, (_, answer) in zip(texts, bags.asked, strict=True)) / len(texts)


def random_codes(model: Lavida) -> Tensor:
    """A vector [V, D] for each token id, the same in every stage and run; with the spread of fresh embeddings."""
    table = model.lm.embedding.weight
    drawn = torch.randn(table.shape, generator=torch.Generator().manual_seed(CODES_SEED))
    return (drawn * model.config.lm.emb_std).to(table)


def questions(lookups: Lookups) -> list[tuple[str, str]]:
    """Question and answer of each context, worded as in the picture task."""
    triples = zip(lookups.task_BG[:, 0], lookups.argument_BG[:, 0], lookups.answer_BG[:, 0], strict=True)
    return [
        (f"digit {COLOURS[argument]}", CHARS[answer])
        if task == DIGIT
        else (f"letter {CHARS[argument]}", COLOURS[answer])
        for task, argument, answer in triples
    ]
