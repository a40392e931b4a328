"""A system under evaluation: from a batch of samples to rows, one per answer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from experiments.data.sample import Sample
from experiments.measure import StageTimer
from experiments.metrics import TextMetric, metric
from experiments.tokens import TokenGeometry, check_counts, count_sources, recall
from shirg import Selection, Selector, Source

if TYPE_CHECKING:
    from lavida_adapter import DecodeConfig, Lavida
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
        generation = self.model.generate(prefix, self.decode, generator=self._generator(batch), timer=timer)
        ms = timer.collect()
        rows = [
            self._row(sample, image.size, selection, text, n_visual, n_prefix)
            for sample, image, selection, text, n_visual, n_prefix in zip(
                batch, images, prefix.selections, generation.texts, prefix.n_visual, prefix.n_tokens, strict=True
            )
        ]
        return Answers(rows, images, prefix.selections, ms)

    def _generator(self, batch: Sequence[Sample]) -> torch.Generator:
        """Seeded by the seed and the batch, so that a resumed job draws what the undisturbed one drew."""
        digest = hashlib.sha256("\n".join([str(self.seed), *(sample.id for sample in batch)]).encode()).digest()
        return torch.Generator(self.model.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def _row(
        self, sample: Sample, size: tuple[int, int], selection: Selection, text: str, n_visual: int, n_prefix: int
    ) -> Row:
        used_T = selection.mask_BT[0]
        kept_T = selection.index_BT[0][used_T & (selection.source_BT[0] == Source.KEPT)].cpu()
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
            "kept": kept_T.tolist(),
            "sources": sources,
            "recall": recall(sample.boxes, kept_T, self.geometry, size),
        }


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
