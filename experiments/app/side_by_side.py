"""Answers one question with several selectors, by the path that eval.py takes: which step of the denoising wrote each
token of an answer, and what the selectors keep in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from experiments import build, profiling
from experiments.app.picture_question import UNKNOWN, PictureQuestion
from experiments.app.token_layer import kept_numbers
from experiments.data.folder import Folder
from experiments.data.sample import Box
from experiments.jobs.results import adapter_path, files_digest
from experiments.jobs.sample_rows import SampleRow
from experiments.kept_between_jobs import take_model
from experiments.metrics.answers import text_metrics
from experiments.token_stats import TokenGeometry, recall
from experiments.viz.examples import printable
from shirg import Selection, UserError

PICTURES = Path("outputs", "app_pictures")
"""Where questions are stored, below the folder in which the page was started."""


@dataclass(frozen=True)
class AnswerSlot:
    """One slot of an answer."""

    text: str
    """The token, with everything visible that would not be."""
    is_end: bool
    """Whether it is a special token: the answer ends there."""
    step: int | None
    """The step that wrote it, counted from 1; 0 for what stood there before; None for a mask that was left."""
    confidence: float | None
    """The probability of the token when it was written; None where the decoding does not tell."""


@dataclass(frozen=True)
class SelectorAnswer:
    """What one selector kept, and what the model answered."""

    selector: str
    row: SampleRow
    """As samples.parquet would hold it."""
    selection: Selection
    geometry: TokenGeometry
    slots: tuple[AnswerSlot, ...]
    ms: Mapping[str, float]
    """Milliseconds by stage, of a second run: the first one warms caches up."""
    retention: float | None
    """Share of the answer's tokens that were kept; None where it is not known where the answer is."""
    is_trained: bool
    """Whether the model's weights are trained ones."""

    @property
    def is_right(self) -> bool | None:
        """By the first metric; None where the right answer is not known."""
        if list(self.row["answers"]) == [UNKNOWN]:
            return None
        return next(iter(self.row["scores"].values())) == 1.0


@dataclass(frozen=True)
class SideBySide:
    """Answers to one question."""

    image: Image.Image
    boxes: tuple[Box, ...]
    answers: tuple[SelectorAnswer, ...]
    command: str
    """Answers the same question on the command line."""


def answer_question(question: PictureQuestion, base: Sequence[str] = (), place: Path = PICTURES) -> SideBySide:
    """Answers a question with each of its selectors.

    Args:
        base: overrides of eval.py that hold for every question.
        place: a folder to store the question in.

    Raises:
        UserError, ConfigError: what the question or the overrides ask for is not possible.
    """
    folder = question.store(place)
    words = question.words(folder, base)
    answers = [_answer(selector, words, question.boxes) for selector in question.selectors]
    image = Folder(root=folder)[0].load_image()
    return SideBySide(image, question.boxes, tuple(answers), question.command(folder, base))


def _answer(selector: str, words: Sequence[str], boxes: Sequence[Box]) -> SelectorAnswer:
    cfg = build.compose_eval(*words, f"selector={selector}")
    build.check_numbers(cfg)
    device = profiling.use_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    dataset = build.build_dataset(cfg)
    sample = dataset[0]
    decode = replace(build.build_decode(cfg, dataset.max_new_tokens), keep_history=True)
    adapter = adapter_path(cfg.adapter, cfg.model, selector)
    shared = take_model(cfg, device, adapter, {"model": files_digest(cfg.model.get("path"))})
    model = shared.model
    try:
        scorers = text_metrics(dataset.metric_names)
        pipeline = build.build_pipeline(cfg, model, decode, scorers, adapter=shared.unmerged)
        shared.settle(pipeline.selector)
        pipeline.check(sample)
        with profiling.explain_oom(model, 1, pipeline.n_vision):
            pipeline.answer([sample])
            found = pipeline.answer([sample])
    except UserError:
        shared.keep()  # nothing has changed in it: a word of the question is wrong
        raise
    shared.keep()
    row, selection = found.rows[0], found.selections[0]
    image = sample.load_image()
    return SelectorAnswer(
        selector=selector,
        row=row,
        selection=selection,
        geometry=pipeline.geometry,
        slots=tuple(answer_slots(found.history, found.confidence, model.tokenizer, model.config.lm.mask_token_id)),
        ms=found.ms,
        retention=recall(boxes, torch.tensor(row["kept"]), pipeline.geometry, image.size),
        is_trained=model.config.trained,
    )


def answer_slots(
    history: Sequence[Tensor], confidence: Sequence[Tensor], tokenizer: Any, mask_id: int
) -> list[AnswerSlot]:
    """The slots of the first answer of a batch.

    Args:
        history: the answers [B, A] after every step.
        confidence: float32 [B, A] of every step, 0 for what the step did not write; none at all where it is not known.
    """
    states = [ids_BA[0].tolist() for ids_BA in history]
    sure = [p_BA[0].tolist() for p_BA in confidence]
    if not states:
        return []
    slots = []
    for place, token in enumerate(states[-1]):
        step = next((i + 1 for i, ids in enumerate(states) if ids[place] != mask_id), None)
        known = sure[step - 1][place] if step is not None and sure else 0.0
        # The first step's state also has what was there before, which no step was asked about.
        written = step if step != 1 or known or not sure else 0
        slots.append(AnswerSlot(*spelled(token, tokenizer), written, known or None))
    return slots


def spelled(token: int, tokenizer: Any) -> tuple[str, bool]:
    """How a token is shown, and whether it is a special one."""
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token)), True
    text = printable(tokenizer.decode([token]))
    return text or "\u00b7", False


@dataclass(frozen=True)
class SharedTokens:
    """What several selectors keep of one picture, by source token."""

    everywhere: frozenset[int]
    """Kept by all that are compared."""
    alone: Mapping[str, frozenset[int]]
    """Kept by this selector and by no other one."""
    left_out: Mapping[str, str]
    """Selectors that are not compared, and why."""

    @property
    def sentence(self) -> str:
        """What is kept by all and by one alone, in words."""
        names = list(self.alone)
        out = "".join(f" Not compared: {name}, which {why}." for name, why in self.left_out.items())
        if len(names) < 2:
            return f"To compare what is kept takes two selectors that choose among the same tokens.{out}"
        both = "Both keep" if len(names) == 2 else f"All {len(names)} keep"
        alone = ", ".join(f"{name} alone {len(tokens)}" for name, tokens in self.alone.items())
        return f"{both} {_count(len(self.everywhere))}; {alone}.{out}"


def _count(n: int) -> str:
    return "1 token" if n == 1 else f"{n} tokens"


def compare_kept(answers: Sequence[SelectorAnswer]) -> SharedTokens:
    """Which source tokens all selectors keep, and which only one does."""
    kept = {answer.selector: kept_numbers(answer.selection) for answer in answers}
    ways = {answer.selector: answer.geometry.geometry for answer in answers if kept[answer.selector]}
    first = next(iter(ways.values()), None)
    compared = {name: kept[name] for name, way in ways.items() if way == first}
    everywhere: frozenset[int] = frozenset.intersection(*compared.values()) if len(compared) > 1 else frozenset()
    alone = {
        name: tokens.difference(*(others for other, others in compared.items() if other != name))
        for name, tokens in compared.items()
    }
    left_out = {
        answer.selector: "makes new tokens" if not kept[answer.selector] else "cuts the picture in another way"
        for answer in answers
        if answer.selector not in compared
    }
    return SharedTokens(everywhere, alone, left_out)
