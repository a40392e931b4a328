"""`data=synth_glyphs`: glyph pictures with their questions, as samples."""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import cycle, islice

from PIL import Image

from experiments.data.sample import Sample
from experiments.data.synthetic.glyphs.questions import ARGUMENTS, WORDS, GlyphQuestion, questions
from experiments.data.synthetic.glyphs.render import PICTURE_PX, to_image
from experiments.data.synthetic.glyphs.scene import DENSITIES, LETTERS, N_KEYS, TASKS, draw_scene
from experiments.data.synthetic.synthetic_dataset import CACHED_SCENES, SyntheticDataset, densities_of
from shirg import UserError

SceneKey = tuple[int, str, int, str, str, int]
"""The arguments of `draw_scene`."""

scene_of = lru_cache(maxsize=CACHED_SCENES)(draw_scene)


@lru_cache(maxsize=CACHED_SCENES)
def _asked(key: SceneKey, n: int, tasks: tuple[str, ...], words: frozenset[str]) -> tuple[GlyphQuestion, ...]:
    return tuple(questions(scene_of(*key), n=n, tasks=tasks, words=words))


def draw_image(*key: *SceneKey) -> Image.Image:
    """The picture of a scene."""
    return to_image(scene_of(*key))


class SynthGlyphs(SyntheticDataset):
    """Questions about glyph pictures (docs/method.md, "The tiny testbed"). Always label results from it synthetic.

    Args:
        split: "train", "val" or "test"; no scene is in two of them.
        n: questions in all; consecutive ones share a picture.
        density: number of distractors: "sparse", "dense", "hard" or "train". Several (a list, or separated by commas)
            alternate picture by picture; sample.meta["density"] names the one of a sample.
        tasks: which of "digit", "letter" and "shape" are asked, in turn.
        leave_out: words that no question asks for, as "red" of "digit red" or "K" of "letter K": to train without them.
            Pictures show them all the same, and they can be answers. A task without any word left is not asked.
        only: the only words that questions ask for: to measure what was left out.
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
        leave_out: Sequence[str] = (),
        only: Sequence[str] = (),
        seed: int = 0,
        qa_per_image: int = 6,
        suffix: str = "",
        max_new_tokens: int = 3,
        metrics: Sequence[str] = ("exact_match", "entity_recall"),
    ) -> None:
        super().__init__(split=split, n=n, qa_per_image=qa_per_image, max_new_tokens=max_new_tokens, metrics=metrics)
        self._densities = densities_of(density, DENSITIES)
        self._words = _words(leave_out, only)
        self._tasks = tuple(task for task in tasks if not self._words.isdisjoint(ARGUMENTS.get(task, self._words)))
        self._seed = seed
        self._suffix = suffix
        if tasks and not self._tasks:
            raise UserError(f"data.leave_out and data.only leave no word that data.tasks={list(tasks)} ask for")
        self._letters = "".join(letter for letter in LETTERS if letter in self._words)
        self._least = sum(task == "letter" for task in islice(cycle(self._tasks), qa_per_image))
        if self._least > min(len(self._letters), *(N_KEYS[density] for density in self._densities)):
            raise UserError(
                f"data.qa_per_image={qa_per_image} is more than a picture can answer with tasks {list(self._tasks)} "
                f"about {len(self._letters)} letters: lower it"
            )
        # Refuses wrong tasks when the dataset is built.
        self._questions(0)

    def _scene(self, picture: int) -> SceneKey:
        number, which = divmod(picture, len(self._densities))
        density = self._densities[which]
        # A picture of this density lacks so few letters that none need be looked for.
        sure = len(self._letters) - (len(LETTERS) - N_KEYS[density]) >= self._least
        wanted = ("", 0) if sure else (self._letters, self._least)
        return self._seed, self.split, number, density, *wanted

    def _questions(self, picture: int) -> tuple[GlyphQuestion, ...]:
        return _asked(self._scene(picture), self.questions_per_picture, self._tasks, self._words)

    def picture_id(self, picture: int) -> str:
        seed, split, number, density, letters, least = self._scene(picture)
        # A picture that was drawn for its letters is not the one that this number has without them.
        return f"{split}-{seed}-{density}-{number:05d}" + (f"-{least}of{letters}" if least else "")

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
            meta={"picture": picture_id, "density": self._scene(picture)[3], "group": question.group},
        )


def _words(leave_out: Sequence[str], only: Sequence[str]) -> frozenset[str]:
    """The words that questions may ask for.

    Raises:
        UserError: a word that no question asks for, or both lists at once.
    """
    for name, listed in (("leave_out", leave_out), ("only", only)):
        if isinstance(listed, str) or (unknown := [word for word in listed if word not in WORDS]):
            wrong = listed if isinstance(listed, str) else unknown[0]
            raise UserError(f"data.{name}: {wrong!r} is no word of a list; questions ask for {', '.join(WORDS)}")
    if leave_out and only:
        raise UserError("data.leave_out and data.only exclude each other: give one of them")
    return frozenset(only or set(WORDS).difference(leave_out))
