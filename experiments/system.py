"""A system under evaluation: from a batch of samples to rows, one per answer."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from experiments.data.sample import Sample
from experiments.measure import StageTimer
from experiments.metrics import TextMetric, metric
from experiments.tokens import TokenGeometry, check_counts, count_sources, recall
from shirg import Selection, Selector, Source

if TYPE_CHECKING:
    from lavida_adapter import CacheSelector, DecodeConfig, Lavida, Prefix
    from lavida_adapter.relevance import Relevance

Row = dict[str, Any]
"""What samples.parquet keeps of one answer; plain JSON."""


@dataclass(frozen=True)
class Answers:
    """A batch, answered."""

    rows: list[Row]
    images: list[Image.Image]
    selections: tuple[Selection, ...]
    ms: dict[str, float]
    """Milliseconds of the whole batch by stage."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A model with everything that decides what it reads, how it answers and how answers are scored."""

    model: "Lavida"
    selector: Selector
    relevance: "Relevance | None"
    decode: "DecodeConfig"
    cache_selector: "CacheSelector | None"
    scorers: dict[str, TextMetric]
    """Text metrics by name, the headline first."""
    geometry: TokenGeometry
    seed: int
    asked: Mapping[str, str] | None = None
    """The question that tokens are ranked by, for each sample id; None is the sample's own."""

    @property
    def headline(self) -> str:
        return next(iter(self.scorers))

    @torch.inference_mode()
    def answer(self, batch: Sequence[Sample]) -> Answers:
        """Answers a batch; depends on nothing but the system and the batch."""
        timer = StageTimer(self.model.device)
        images = load_pictures(batch)
        prefix = self.model.encode(
            images,
            [sample.question if self.asked is None else self.asked[sample.id] for sample in batch],
            self.selector,
            relevance=self.relevance,
            ids=[sample.id for sample in batch],
            prompts=[sample.prompt for sample in batch],
            boxes=[sample.boxes for sample in batch],
            timer=timer,
        )
        generation = self.model.generate(
            prefix, self.decode, cache_selector=self.cache_selector, generator=self._generator(batch), timer=timer
        )
        ms = timer.collect()
        left = prefix.selections
        if generation.cached_BP is not None:
            left = tuple(left_in_cache(prefix, generation.cached_BP))
        rows = [
            self._row(sample, image.size, selection, cached, text, n_visual, n_prefix)
            for sample, image, selection, cached, text, n_visual, n_prefix in zip(
                batch, images, prefix.selections, left, generation.texts, prefix.n_visual, prefix.n_tokens, strict=True
            )
        ]
        return Answers(rows, images, left, ms)

    def _generator(self, batch: Sequence[Sample]) -> torch.Generator:
        """Seeded by the seed and the batch, so that a resumed job draws what the undisturbed one drew."""
        digest = hashlib.sha256("\n".join([str(self.seed), *(sample.id for sample in batch)]).encode()).digest()
        return torch.Generator(self.model.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def _row(
        self,
        sample: Sample,
        size: tuple[int, int],
        selection: Selection,
        left: Selection,
        text: str,
        n_visual: int,
        n_prefix: int,
    ) -> Row:
        """`selection` is what was fed, `left` what of it the answer could see to the end."""
        kept_T = left.index_BT[0][left.mask_BT[0] & (left.source_BT[0] == Source.KEPT)].cpu()
        sources = count_sources(selection)
        check_counts(self.selector, sources, n_visual, self.geometry, size, sample.id)
        return {
            "id": sample.id,
            "picture": picture_of(sample),
            "question": sample.question,
            "prompt": sample.prompt,
            "answers": list(sample.answers),
            "prediction": text,
            "scores": {n: m.score(prediction=text, references=sample.answers) for n, m in self.scorers.items()},
            "subtask": sample.subtask,
            "group": str(sample.meta.get("group", "")),
            "density": str(sample.meta.get("density", "")),
            "n_visual": n_visual,
            "n_prefix": n_prefix,
            "n_cache": None if self.cache_selector is None else int(left.mask_BT.sum()),
            "kept": kept_T.tolist(),
            "sources": sources,
            "recall": recall(sample.boxes, kept_T, self.geometry, size),
        }


def left_in_cache(prefix: "Prefix", cached_BP: Tensor) -> Iterator[Selection]:
    """Each prompt's selection without the tokens whose rows were cut out of the cache."""
    for selection, visual_P, cached_P in zip(prefix.selections, prefix.visual_BP, cached_BP, strict=True):
        mask_BT = selection.mask_BT.clone()
        mask_BT[selection.mask_BT] = cached_P[visual_P]
        yield replace(selection, mask_BT=mask_BT)


def picture_of(sample: Sample) -> str:
    """The name of the sample's picture; samples that share it are one cluster."""
    return str(sample.meta.get("picture", sample.id))


def load_pictures(batch: Sequence[Sample]) -> list[Image.Image]:
    """One picture per sample; samples that share one share the object, and the tower runs once for it."""
    pictures: dict[str, Image.Image] = {}
    for sample in batch:
        if picture_of(sample) not in pictures:
            pictures[picture_of(sample)] = sample.load_image()
    return [pictures[picture_of(sample)] for sample in batch]


def text_metrics(names: Sequence[str]) -> dict[str, TextMetric]:
    """The metrics that score answers, headline first; token metrics are computed from the selections instead."""
    scorers = {name: m for name in names if isinstance(m := metric(name), TextMetric)}
    if not scorers:
        raise ValueError(f"data.metrics={list(names)} scores no answers: name a text metric, for example exact_match")
    return scorers
