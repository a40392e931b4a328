"""Requests of lmms-eval, answered by one of our pipelines; docs/report.md, "lmms-eval".

Does not import lmms-eval; `lmms_model` has the class that lmms-eval loads.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from experiments import build, profiling
from experiments.data.image_io import to_rgb
from experiments.data.sample import Sample
from experiments.errors import ConfigError
from experiments.inference import EvalPipeline
from experiments.jobs.results import adapter_path
from experiments.progress import Progress
from lavida_adapter.families import FAMILIES
from shirg import UserError

_GREEDY = {"num_beams": (None, 1), "top_k": (None, 0), "top_p": (None, 0, 1)}
"""Values of sampling arguments of other models that have no effect."""


@dataclass(frozen=True)
class LmmsRequest:
    """One document of a task."""

    id: str
    prompt: str
    visuals: Sequence[Any]
    options: Mapping[str, Any]
    """The task's `generation_kwargs`."""
    question: str


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    text: str
    n_prefix: int
    """Tokens of the prompt, including the selected vision tokens."""


class Answerer:
    """A pipeline that answers requests in batches, in their order.

    Args:
        overrides: eval.py's, for example `{"selector": "shirg", "budget": "base"}`. `decode.max_new_tokens` replaces
            the tasks' own.

    Raises:
        UserError: there is no such option, or its value is wrong.
    """

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        words = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
        self.cfg, selector = _config(words)
        adapter = adapter_path(self.cfg.adapter, self.cfg.model, selector)
        # lmms-eval's own launchers start one process for each device.
        self.device = profiling.resolve_device(self.cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
        model = build.build_model(self.cfg, self.device)
        # The length of answers is set by the task of each request.
        self._pipeline = build.build_pipeline(self.cfg, model, build.build_decode(self.cfg, 1), {}, adapter=adapter)

    def answer(self, requests: Sequence[LmmsRequest]) -> list[Answer]:
        size: int = self.cfg.batch_size
        answers: list[Answer] = []
        with Progress("lmms-eval", len(requests)) as progress:
            while len(answers) < len(requests):
                batch = self._alike(requests[len(answers) : len(answers) + size])
                rows = self._pipeline_for(batch[0]).answer([_sample(request) for request in batch]).rows
                answers += [
                    Answer(_until(row["prediction"], request.options.get("until")), row["n_prefix"])
                    for request, row in zip(batch, rows, strict=True)
                ]
                progress.advance(len(batch))
        return answers

    @staticmethod
    def _alike(requests: Sequence[LmmsRequest]) -> Sequence[LmmsRequest]:
        """The first requests that have the same options."""
        other = next((i for i, r in enumerate(requests) if r.options != requests[0].options), len(requests))
        return requests[:other]

    def _pipeline_for(self, request: LmmsRequest) -> EvalPipeline:
        """The pipeline, with the answer length and the temperature of the request's task."""
        options = request.options
        length = self.cfg.decode.max_new_tokens or options.get("max_new_tokens")
        if length is None:
            raise UserError(
                f"{request.id}: its task names no max_new_tokens; add decode.max_new_tokens=N to --model_args"
            )
        if not options.get("do_sample"):
            return replace(self._pipeline, decode=build.build_decode(self.cfg, int(length)))
        asked = {key: options[key] for key, ignored in _GREEDY.items() if options.get(key) not in ignored}
        if "num_beams" in asked:
            raise UserError(
                f"{request.id}: its task samples with num_beams={asked['num_beams']}, but a masked diffusion model has "
                "no beams; add --gen_kwargs do_sample=False for the likeliest answer"
            )
        decode = build.build_decode(self.cfg, int(length))
        decode = replace(decode, temperature=float(options.get("temperature", 1.0)), **asked)
        try:
            FAMILIES[self._pipeline.model.config.lm.family].sampler.check(decode)
        except UserError as error:
            raise UserError(f"{request.id}: its task samples. {error}, by --gen_kwargs do_sample=False") from None
        return replace(self._pipeline, decode=decode)


def _config(overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """eval.py's config, and the name of its selector."""
    try:
        cfg, choices = build.compose_command("eval", overrides)
    except ConfigError as error:
        raise UserError(f"--model_args: {error}") from None
    return cfg, choices["selector"]


def _sample(request: LmmsRequest) -> Sample:
    if len(request.visuals) != 1 or not isinstance(request.visuals[0], Image.Image):
        kinds = ", ".join(type(visual).__name__ for visual in request.visuals) or "nothing"
        raise UserError(f"{request.id}: the model reads one picture with each question; this one comes with {kinds}")
    return Sample(
        id=request.id,
        dataset="lmms-eval",
        split="",
        load_image=partial(to_rgb, request.visuals[0]),
        size=request.visuals[0].size,
        question=request.question,
        prompt=request.prompt,
        answers=(),
    )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop else text
    return text
