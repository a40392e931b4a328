"""`data=synth_glyphs`: glyph pictures with their questions, as samples."""

from collections.abc import Sequence
from functools import lru_cache, partial

from experiments.data.sample import Sample
from experiments.data.synthetic.glyphs.questions import questions
from experiments.data.synthetic.glyphs.render import PICTURE_PX, to_image
from experiments.data.synthetic.glyphs.scene import DENSITIES, TASKS, draw_scene
from experiments.data.synthetic.synthetic_dataset import SyntheticDataset, densities_of

_scene = lru_cache(maxsize=64)(draw_scene)
"""Cached, because consecutive samples share a picture."""


class SynthGlyphs(SyntheticDataset):
    """Questions about glyph pictures (docs/method.md, "The tiny testbed"). Always label results from it synthetic.

    Args:
        split: "train", "val" or "test"; no scene is in two of them.
        n: questions in all; consecutive ones share a picture.
        density: number of distractors: "sparse", "dense", "hard" or "train". Several (a list, or separated by commas)
            alternate picture by picture; sample.meta["density"] names the one of a sample.
        tasks: which of "digit", "letter" and "shape" are asked, in turn.
        seed: other seeds draw other pictures.
        qa_per_image: questions about one picture.
        suffix: put after each question in the prompt.
        max_new_tokens: longest answer in tokens; answers are one token.
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
        super().__init__(split=split, n=n, qa_per_image=qa_per_image, max_new_tokens=max_new_tokens, metrics=metrics)
        self._densities = densities_of(density, DENSITIES)
        self._tasks = tuple(tasks)
        self._seed = seed
        self._suffix = suffix
        # Refuses wrong tasks when the dataset is built.
        questions(_scene(seed, split, 0, self._densities[0]), n=qa_per_image, tasks=self._tasks)

    def sample(self, picture: int, turn: int) -> Sample:
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
