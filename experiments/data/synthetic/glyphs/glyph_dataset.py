"""`data=synth_glyphs`: glyph pictures with their questions, as samples."""

from collections.abc import Sequence
from functools import lru_cache, partial

from PIL import Image

from experiments.data.sample import Sample
from experiments.data.synthetic.glyphs.questions import GlyphQuestion, questions
from experiments.data.synthetic.glyphs.render import PICTURE_PX, to_image
from experiments.data.synthetic.glyphs.scene import DENSITIES, TASKS, draw_scene
from experiments.data.synthetic.synthetic_dataset import CACHED_SCENES, SyntheticDataset, densities_of

scene_of = lru_cache(maxsize=CACHED_SCENES)(draw_scene)


@lru_cache(maxsize=CACHED_SCENES)
def _asked(
    seed: int, split: str, index: int, density: str, n: int, tasks: tuple[str, ...]
) -> tuple[GlyphQuestion, ...]:
    return tuple(questions(scene_of(seed, split, index, density), n=n, tasks=tasks))


def draw_image(seed: int, split: str, index: int, density: str) -> Image.Image:
    """The picture of scene number `index`."""
    return to_image(scene_of(seed, split, index, density))


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
        self._questions(0)

    def _scene(self, picture: int) -> tuple[int, str, int, str]:
        """The arguments of `draw_scene`."""
        number, which = divmod(picture, len(self._densities))
        return self._seed, self.split, number, self._densities[which]

    def _questions(self, picture: int) -> tuple[GlyphQuestion, ...]:
        return _asked(*self._scene(picture), self.questions_per_picture, self._tasks)

    def picture_id(self, picture: int) -> str:
        seed, split, number, density = self._scene(picture)
        return f"{split}-{seed}-{density}-{number:05d}"

    def sample(self, picture: int, turn: int) -> Sample:
        question, picture_id = self._questions(picture)[turn], self.picture_id(picture)
        return Sample(
            id=f"{picture_id}-{question.text.replace(' ', '-')}",
            dataset=self.name,
            split=self.split,
            load_image=partial(draw_image, *self._scene(picture)),
            size=(PICTURE_PX, PICTURE_PX),
            question=question.text,
            prompt=question.text + self._suffix,
            answers=(question.answer,),
            subtask=question.subtask,
            boxes=(question.box,),
            meta={"picture": picture_id, "density": self._scene(picture)[-1], "group": question.group},
        )
