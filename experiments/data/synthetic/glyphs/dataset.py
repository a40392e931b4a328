"""`data=synth_glyphs`: glyph pictures with their questions, as samples."""

from collections.abc import Sequence
from functools import lru_cache, partial

from experiments.data.sample import Sample
from experiments.data.synthetic.glyphs.questions import questions
from experiments.data.synthetic.glyphs.render import PICTURE_PX, to_image
from experiments.data.synthetic.glyphs.scene import BUCKETS, DENSITIES, draw_scene
from experiments.data.synthetic.glyphs.vocabulary import TASKS

_scene = lru_cache(maxsize=64)(draw_scene)
"""Consecutive samples share a picture."""


class SynthGlyphs:
    """Questions about glyph pictures (docs/method.md, "The tiny testbed"). Always label results from it synthetic.

    Args:
        split: "train", "val" or "test"; no scene is in two of them.
        n: questions in all; consecutive ones share a picture.
        density: how crowded the pictures are: "sparse", "dense", "hard" or "train". Several (a list, or separated by
            commas) take turns picture by picture; sample.meta["density"] says which.
        tasks: which of "digit", "letter" and "shape" are asked, in turn.
        seed: other seeds draw other pictures.
        qa_per_image: questions about one picture.
        suffix: put after each question in the prompt.
        max_new_tokens: room for the answer, which is one token.
    """

    name = "synth_glyphs"

    def __init__(
        self,
        *,
        split: str,
        n: int,
        density: str | Sequence[str],
        tasks: Sequence[str] = TASKS,
        seed: int = 0,
        qa_per_image: int = 6,
        suffix: str = "",
        max_new_tokens: int = 3,
        metrics: Sequence[str] = ("exact_match", "entity_recall"),
    ) -> None:
        densities = [part.strip() for part in density.split(",")] if isinstance(density, str) else list(density)
        if split not in BUCKETS:
            raise ValueError(f"data.split={split!r} does not exist: choose one of {', '.join(BUCKETS)}")
        for unknown in set(densities).difference(DENSITIES):
            raise ValueError(f"data.density={unknown!r} does not exist: choose from {', '.join(DENSITIES)}")
        if not densities or len(set(densities)) != len(densities):
            raise ValueError(f"data.density={densities} must name one or more different densities")
        if n < 1 or qa_per_image < 1:
            raise ValueError(f"data.n={n} and data.qa_per_image={qa_per_image} must be positive")
        self.split = split
        self.metric_names = tuple(metrics)
        self.max_new_tokens = max_new_tokens
        self._n = n
        self._densities = densities
        self._tasks = tuple(tasks)
        self._seed = seed
        self.questions_per_picture = qa_per_image
        self._suffix = suffix
        questions(_scene(seed, split, 0, densities[0]), n=qa_per_image, tasks=self._tasks)  # refuse wrong tasks at once

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._n:
            raise IndexError(f"sample {index} of {self._n}")
        picture, turn = divmod(index, self.questions_per_picture)
        number, which = divmod(picture, len(self._densities))
        density = self._densities[which]
        scene = _scene(self._seed, self.split, number, density)
        question = questions(scene, n=turn + 1, tasks=self._tasks)[turn]
        picture_id = f"{self.split}-{self._seed}-{density}-{number:05d}"
        return Sample(
            id=f"{picture_id}-{question.text.replace(' ', '-')}",
            dataset=self.name,
            split=self.split,
            load_image=partial(to_image, scene),
            size=(PICTURE_PX, PICTURE_PX),
            question=question.text,
            prompt=question.text + self._suffix,
            answers=(question.answer,),
            subtask=question.subtask,
            boxes=(question.box,),
            meta={"picture": picture_id, "density": density, "group": question.group},
        )
