"""From a batch of samples to their rows: encode, generate, score, count tokens, measure what a smaller cache moves."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from experiments.data.image_io import PictureBatch, Pictures, load_batch
from experiments.data.sample import Sample
from experiments.jobs.sample_facts import facts_of
from experiments.jobs.sample_rows import SampleRow
from experiments.metrics.answers import Scorer, score_answer
from experiments.metrics.final_answer import AnswerRule, extract
from experiments.token_stats import TokenGeometry, check_counts, count_sources, recall, spread_of
from lavida_adapter import CachePacker, CacheSelector
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.infill import Draft, Infilled, make_draft
from lavida_adapter.kv_cache import PrefixCache, StoredPrefix
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prompt import prompt_ids
from lavida_adapter.timing import StageTimer
from shirg import Selection, Selector, Source, UserError

if TYPE_CHECKING:
    from lavida_adapter import DecodeConfig, Generation, Lavida, Prefix
    from lavida_adapter.relevance import Relevance


@dataclass(frozen=True)
class Answers:
    """A batch, answered."""

    rows: list[SampleRow]
    pictures: Pictures
    selections: tuple[Selection, ...]
    ms: dict[str, float]
    """Milliseconds of the whole batch by stage."""
    history: tuple[Tensor, ...] = ()
    """The answers after every step, with `decode.keep_history`."""
    confidence: tuple[Tensor, ...] = ()
    """As in `Generation`."""


@dataclass(frozen=True, kw_only=True)
class EvalPipeline:
    """A model with everything that decides what it reads, how it answers and how answers are scored."""

    model: "Lavida"
    selector: Selector
    relevance: "Relevance | None"
    decode: "DecodeConfig"
    cache: "CacheSelector | CachePacker | None"
    """What is done to the prefix cache, if anything."""
    scorers: dict[str, Scorer]
    """Metrics of answers by name, the headline first."""
    geometry: TokenGeometry
    seed: int
    answer_rule: AnswerRule = "whole"
    """Which part of a generated text is the answer."""
    asked: Mapping[str, str] | None = None
    """The question that tokens are ranked by, for each sample id; None is the sample's own."""

    @property
    def headline(self) -> str:
        return next(iter(self.scorers))

    @property
    def n_vision(self) -> int:
        """Vision tokens of a prompt, as far as the configuration tells."""
        budget = self.selector.budget
        if budget is None or budget == "matched":
            return self.model.config.budgets["full" if budget is None else "base"]
        return self.geometry.count_of(budget)

    @torch.inference_mode()
    def answer(self, batch: Sequence[Sample], loaded: PictureBatch | None = None) -> Answers:
        """Answers a batch. The result depends on the pipeline and the batch alone.

        Args:
            loaded: its pictures, where they were loaded ahead of time.
        """
        timer = StageTimer(self.model.device)
        drafts = [self.draft_of(sample) for sample in batch]
        loaded = load_batch(batch) if loaded is None else loaded
        pictures = loaded.pictures
        prefix = self.model.encode(
            pictures,
            [sample.question if self.asked is None else self.asked[sample.id] for sample in batch],
            self.selector,
            relevance=self.relevance,
            ids=[sample.id for sample in batch],
            prompts=[sample.prompt for sample in batch],
            histories=[sample.history for sample in batch],
            boxes=[sample.boxes for sample in batch],
            timer=timer,
        )
        generation = self.model.generate(
            prefix,
            self.decode,
            cache_selector=self.cache if isinstance(self.cache, CacheSelector) else None,
            cache_packer=self.cache if isinstance(self.cache, CachePacker) else None,
            drafts=[() if draft is None else draft.ids for draft in drafts] if any(drafts) else (),
            generator=self._generator(batch),
            timer=timer,
        )
        ms = timer.collect()
        moved = self._drift(prefix, generation)
        left = prefix.selections
        if generation.cached_BP is not None:
            left = tuple(left_in_cache(prefix, generation.cached_BP))
        sizes = [picture.size for picture in pictures]
        written = [self._infilled(generation, i, draft) for i, draft in enumerate(drafts)]
        rows = [
            self._row(sample, sizes[i], prefix, generation, i, left[i], moved[i], written[i])
            for i, sample in enumerate(batch)
        ]
        for row, digest in zip(rows, loaded.digests, strict=True):
            row["picture_digest"] = digest
        return Answers(rows, pictures, left, ms, generation.history, generation.confidence)

    def check(self, sample: Sample) -> None:
        """Finds a prompt that cannot fit into the model's context, and an unusable draft, without a picture.

        Raises:
            UserError: names the sample.
        """
        self.draft_of(sample)
        config, budget = self.model.config, self.selector.budget
        thin = self.geometry((1, 4))  # a picture with padding, where this geometry has any
        less = self.selector.may_use_less_on(thin.layout, padding=not bool(thin.valid_N.all()))
        fixed = budget not in (None, "matched") and not less
        n_vision = self.n_vision if fixed else 0
        most = min(config.tokenizer_model_max_length, config.lm.max_sequence_length - self.decode.max_new_tokens)
        turns = (*sample.history, sample.prompt)
        # A token has at least one byte; a turn may begin with the line break of its header.
        if self._n_template(len(turns)) + sum(len(turn.encode()) + 1 for turn in turns) + n_vision <= most:
            return
        n_text = len(prompt_ids(self.model.tokenizer, sample.prompt, config, history=sample.history)) - 1
        if n_text + n_vision > most:
            asked = "question or leave out the turns before it" if sample.history else "question"
            raise UserError(
                f"{sample.id}: {n_text} tokens of text, at least {n_vision} of the picture and "
                f"{self.decode.max_new_tokens} of the answer do not fit into the model's context: shorten the "
                f"{asked}, or lower the budget or decode.max_new_tokens"
            )

    @cached_property
    def _n_template(self) -> Callable[[int], int]:
        """Tokens of a prompt of so many turns without a text in any of them."""
        tokenizer, config = self.model.tokenizer, self.model.config
        return cache(lambda n: len(prompt_ids(tokenizer, "", config, history=[""] * (n - 1))))

    def draft_of(self, sample: Sample) -> Draft | None:
        """What a sample's answer begins with, if anything.

        Raises:
            UserError: a draft that is unusable or longer than an answer; the message names the sample.
        """
        if not sample.draft:
            return None
        try:
            draft = make_draft(sample.draft, self.model.tokenizer, self.model.config)
        except UserError as error:
            raise UserError(f"{sample.id}: {error}") from None
        if len(draft.ids) > self.decode.max_new_tokens:
            raise UserError(
                f"{sample.id}: the draft has {len(draft.ids)} tokens, the answer only {self.decode.max_new_tokens}: "
                "raise decode.max_new_tokens"
            )
        return draft

    def _row(
        self,
        sample: Sample,
        size: tuple[int, int],
        prefix: "Prefix",
        generation: "Generation",
        i: int,
        left: Selection,
        moved: "Moved",
        written: Infilled,
    ) -> SampleRow:
        """The row of sample number `i` of the batch; `left` is what of its selection stayed in the cache to the end."""
        kept_T = left.index_BT[0][left.mask_BT[0] & (left.source_BT[0] == Source.KEPT)].cpu()
        sources, n_visual = count_sources(prefix.selections[i]), prefix.n_visual[i]
        extracted = extract(self.answer_rule, written.text, written.gaps)
        check_counts(self.selector, sources, n_visual, self.geometry, size, sample.id)
        placed = self.geometry(size)
        spread = spread_of(kept_T, placed)
        row = {
            **facts_of(sample),
            "prediction": extracted.answer,
            "text": written.text,
            "has_final": extracted.found,
            "gaps": list(written.gaps),
            "scores": score_answer(self.scorers, extracted.answer, sample.answers, sample.target),
            "n_visual": n_visual,
            "n_prefix": prefix.n_tokens[i],
            "n_cache": moved.n_cache,
            "kept": kept_T.tolist(),
            "sources": sources,
            "recall": recall(sample.boxes, kept_T, self.geometry, size),
            "n_valid": int(placed.valid_N.sum()),
            "coverage": spread.coverage,
            "gini": spread.gini,
            "kept_map": spread.kept_map,
            "n_steps": generation.steps[i],
            "cache_bytes": moved.cache_bytes,
            "drift": moved.drift,
            "same_top1": moved.same_top1,
        }
        return cast(SampleRow, row)

    def _infilled(self, generation: "Generation", i: int, draft: Draft | None) -> Infilled:
        """The text of answer number `i`; without a draft it has no gaps."""
        if draft is None:
            return Infilled(generation.texts[i], ())
        return draft.filled(generation.ids_BA[i].tolist(), self.model.tokenizer, self.model.config)

    def _drift(self, prefix: "Prefix", generation: "Generation") -> list["Moved"]:
        """For each prompt the bytes of its cache and, where the cache was made smaller, its drift; not timed.

        An answer that was complete before the cut has read the whole prefix, whatever became of it afterwards.
        """
        n = len(prefix.n_tokens)
        if generation.cache is None:
            return [Moved()] * n
        size = generation.cache.n_bytes / n
        if self.cache is None:
            return [Moved(size)] * n
        fed = self.model.prefill(prefix)
        found = drift(self.model.lm, fed, generation.cache, self.decode.max_new_tokens)
        left: list[int | None] = [None] * n
        if isinstance(self.cache, CacheSelector):
            rows = mean_rows(generation.cache, len(self.model.lm.layers), n)
            given = zip(rows, prefix.n_tokens, prefix.n_visual, strict=True)
            left = [round(row - (total - visual)) for row, total, visual in given]
        moved = [Moved(size, *each) for each in zip(found.most, found.same_top1, left, strict=True)]
        if generation.cached_BP is None:
            return moved
        whole = (generation.cached_BP == prefix.mask_BP).all(-1).tolist()
        uncut = [Moved(fed.n_bytes / n, 0.0, 1.0, n_visual) for n_visual in prefix.n_visual]
        return [a if is_whole else b for is_whole, a, b in zip(whole, uncut, moved, strict=True)]

    def _generator(self, batch: Sequence[Sample]) -> torch.Generator:
        """Seeded by the seed and the batch, so that a resumed job draws what the undisturbed one drew."""
        digest = hashlib.sha256("\n".join([str(self.seed), *(sample.id for sample in batch)]).encode()).digest()
        return torch.Generator(self.model.device).manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Moved:
    """What the cache of one prompt takes and, where it was made smaller, how far that moved the model."""

    cache_bytes: float | None = None
    drift: float | None = None
    """Largest |difference| of a logit."""
    same_top1: float | None = None
    n_cache: int | None = None
    """Picture rows that a cache selector left, as a mean over layers; it never drops text."""


@dataclass(frozen=True)
class Drift:
    """For each prompt of a batch, over all slots of an answer that is still masked."""

    most: tuple[float, ...]
    """Largest |difference| of a logit."""
    same_top1: tuple[float, ...]
    """Share of slots whose likeliest token is the same; the mask token does not compete."""


@torch.inference_mode()
def drift(lm: LanguageModel, whole: PrefixCache, stored: StoredPrefix, n_answer: int) -> Drift:
    """How far the logits of a first step over `stored` are from those over `whole`, for answers of `n_answer` masks.

    The mask token is never an answer and is left out.
    """
    mask_id = lm.config.mask_token_id
    ids_BA = torch.full((len(whole.next_position_B), n_answer), mask_id, device=whole.next_position_B.device)
    expected, found = (DecodeSteps(lm, cache, n_answer)(ids_BA).float() for cache in (whole, stored))
    for logits in (expected, found):
        logits[..., mask_id] = 0.0
    most_B = (expected - found).abs().amax(dim=(1, 2))
    for logits in (expected, found):
        logits[..., mask_id] = float("-inf")
    same_B = (expected.argmax(-1) == found.argmax(-1)).float().mean(-1)
    return Drift(tuple(most_B.tolist()), tuple(same_B.tolist()))


def mean_rows(cache: StoredPrefix, n_layers: int, n_prompts: int) -> list[float]:
    """How many rows of each prompt a cache has, without padding, as a mean over layers."""
    total = [0] * n_prompts
    for layer in range(n_layers):
        mask_BP = cache.mask(layer)
        rows = [cache.n_slots(layer)] * n_prompts if mask_BP is None else mask_BP.sum(-1).tolist()
        total = [a + b for a, b in zip(total, rows, strict=True)]
    return [n / n_layers for n in total]


def left_in_cache(prefix: "Prefix", cached_BP: Tensor) -> Iterator[Selection]:
    """Each prompt's selection without the tokens whose rows were cut out of the cache."""
    for selection, visual_P, cached_P in zip(prefix.selections, prefix.visual_BP, cached_BP, strict=True):
        mask_BT = selection.mask_BT.clone()
        mask_BT[selection.mask_BT] = cached_P[visual_P]
        yield replace(selection, mask_BT=mask_BT)
