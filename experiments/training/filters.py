"""Drops training examples whose prompt fills the model's context and leaves no room for the answer."""

from collections.abc import Mapping
from functools import cached_property
from itertools import islice

import torch
from PIL import Image

from experiments.data.sample import Dataset, Listed, Sample
from lavida_adapter.lightning_module import LavidaModule
from lavida_adapter.prompt import prompt_ids, template_of
from lavida_adapter.relevance import External, NoRelevance
from shirg import UserError

NO_ROOM = "whose prompt leaves no room for the answer"


class LengthFilter:
    """True for a sample whose picture and prompt leave room for at least one token of the answer.

    A picture counts with the most tokens that any of the stage's selectors gives for any canvas.

    Args:
        n_answer: tokens of an answer that the model must have positions for, beside that one token in training.
    """

    def __init__(self, stage: LavidaModule, n_answer: int = 0) -> None:
        self.stage, self.config = stage, stage.model.config
        most = self.config.tokenizer_model_max_length - 1
        self.most = min(most, self.config.lm.max_sequence_length - n_answer) if n_answer else most
        """Tokens that picture and prompt may have."""
        template = template_of(self.config)
        self.turn = template.end + template.head("assistant")
        """What is around every text; the header of the longest role."""
        self.template = template.start + template.head("system") + self.config.system_prompt + 2 * self.turn

    def __call__(self, sample: Sample) -> bool:
        turns = [*sample.history, sample.prompt]
        # A token is at least one byte, so few texts have to be tokenised.
        longest = len((self.template + "".join(turns)).encode()) + len(turns) * len(self.turn)
        if longest + self.most_visual <= self.most:
            return True
        ids = prompt_ids(self.stage.model.tokenizer, sample.prompt, self.config, history=sample.history, training=True)
        return len(ids) - 1 + self.most_visual <= self.most

    @cached_property
    @torch.no_grad()
    def most_visual(self) -> int:
        """The largest number of picture tokens over all canvases, and over the selectors that train in turn."""
        blanks = [Image.new("RGB", size) for size in self.config.image_grid_pinpoints]
        stage, n = self.stage, len(blanks)
        # External scores are those of a dataset's pictures alone.
        relevance = NoRelevance() if isinstance(stage.relevance, External) else stage.relevance
        boxes = [((0.0, 0.0, 1.0, 1.0),)] * n
        in_turn = () if stage.mix is None else (selector for turn in stage.mix.turns for selector in turn)
        with stage.precision():
            prefixes = [
                stage.model.encode(blanks, ["?"] * n, selector, relevance=relevance, boxes=boxes)
                for selector in (stage.selector, *in_turn)
            ]
        return max(max(prefix.n_visual) for prefix in prefixes)


def first_that_fit(dataset: Dataset, stage: LavidaModule, n: int) -> list[Sample]:
    """The first `n` samples that can be answered; what can be learned from may leave no room for a whole answer."""
    fits = LengthFilter(stage, dataset.max_new_tokens)
    return list(islice(filter(fits, (dataset[i] for i in range(len(dataset)))), n))


def drop_too_long(parts: Mapping[str, Dataset], stage: LavidaModule) -> None:
    """Filters every dataset that holds a list, and prints how many examples each has.

    Raises:
        UserError: a dataset of which no example is left.
    """
    length_filter = LengthFilter(stage)
    for part in parts.values():
        if isinstance(part, Listed):
            before = len(part)
            part.keep(length_filter, NO_ROOM)
            dropped = ", ".join(f"{count} {reason}" for reason, count in part.dropped.items())
            if not len(part):
                raise UserError(
                    f"{part.name}: none of its {before} examples can be learned from: dropped {dropped}; lower the "
                    "budget or shorten the texts"
                )
        else:
            dropped = ""
        print(
            f"data     {part.name} {part.split}: {len(part):,} examples" + (f"; dropped {dropped}" if dropped else "")
        )
