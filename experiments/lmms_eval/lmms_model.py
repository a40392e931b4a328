"""The model that `lmms-eval --model shirg` finds; pyproject.toml names it in the group `lmms_eval.models`.

    lmms-eval --model shirg --model_args model=lavida_8b,selector=shirg,budget=base,question=question \\
        --tasks docvqa_val --batch_size 8 --output_path outputs/lmms --log_samples
"""

from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from experiments.lmms_eval.answerer import Answerer, LmmsRequest
from shirg import UserError


class Shirg(lmms):
    """One of our pipelines as a model of lmms-eval.

    Args:
        question: column of a task's documents that holds the question alone, by which tokens are ranked; without it
            they are ranked by the whole prompt.
        batch_size: the value of `--batch_size`.
        device: the value of `--device`.
        overrides: overrides of eval.py, each a `key=value` of `--model_args`.
    """

    is_simple = True

    def __init__(
        self,
        question: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise UserError("--max_batch_size searches for a batch size; give --batch_size=N")
        given = {"batch_size": batch_size, "device": device}
        self._answerer = Answerer({**overrides, **{key: value for key, value in given.items() if value is not None}})
        self._question = question

    @property
    def device(self) -> torch.device:
        return self._answerer.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        answers = self._answerer.answer([self._request(*instance.args) for instance in requests])
        return [GenerationResult(a.text, TokenCounts(input_tokens=a.n_prefix)) for a in answers]

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError(
            "a masked diffusion model gives no likelihood of a continuation: choose tasks whose output_type is "
            "generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError("a prefix is one picture and one question: choose tasks of one round")

    def _request(
        self, context: str, options: dict[str, Any], to_visuals: Any, doc_id: int, task: str, split: str
    ) -> LmmsRequest:
        document = self.task_dict[task][split][doc_id]
        if self._question is not None and not isinstance(document.get(self._question), str):
            raise UserError(
                f"question={self._question}: the documents of {task} have no such text; they have {', '.join(document)}"
            )
        question = context if self._question is None else document[self._question]
        return LmmsRequest(f"{task}/{split}/{doc_id}", context, to_visuals(document) or (), options, question)


MANIFEST = ModelManifest(model_id="shirg", simple_class_path=f"{__name__}.{Shirg.__name__}")
