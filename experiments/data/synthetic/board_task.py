"""The base class of the four task families: splits, questions in turn, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random
from typing import ClassVar

from PIL import Image

from experiments.data.sample import Sample
from experiments.data.synthetic.board import Board, Stamp, box_of, generator, to_image
from experiments.data.synthetic.glyphs.render import PICTURE_PX
from experiments.data.synthetic.glyphs.scene import MAX_ATTEMPTS
from experiments.data.synthetic.synthetic_dataset import (
    BUCKETS,
    CACHED_ATTEMPTS,
    CACHED_SCENES,
    SyntheticDataset,
    densities_of,
)
from shirg import UserError

DENSITIES = {"sparse": (0.0, 0.0), "dense": (1.0, 1.0), "train": (0.0, 1.0)}
"""Least and greatest share of a family's largest crowd of distractors."""


@dataclass(frozen=True)
class Question:
    """A question about a board."""

    text: str
    answer: str
    evidence: tuple[Stamp, ...]
    """The stamps that show the answer."""
    absent: bool = False
    """Whether the answer is that there is none; the evidence is then the stamps that could be confused with it."""


class SynthTask(SyntheticDataset):
    """Questions about drawn pictures (docs/method.md, "Four task families"). Always label results synthetic.

    Args:
        split: "train", "val" or "test"; no picture's content is in two of them.
        n: questions in all; consecutive ones share a picture.
        density: "sparse", "dense" or "train", which has any number of distractors between; several (a list, or
            separated by commas) alternate picture by picture, and sample.meta["density"] names the one of a sample.
        tasks: which of the family's subtasks are asked, in turn; all of them by default.
        seed: other seeds draw other pictures.
        qa_per_image: questions about one picture.
        suffix: put after each question in the prompt.
        max_new_tokens: longest answer in tokens; answers are at most two tokens and an end token.
        metrics: names of `experiments.metrics`; the first is the headline. The family's own by default.
    """

    TASKS: ClassVar[tuple[str, ...]]
    LOOKUPS: ClassVar[tuple[str, ...]]
    """The subtasks that can be answered from a bag of words for each stamp."""
    METRICS: ClassVar[tuple[str, ...]]
    GUARD: ClassVar[bool] = False
    """Whether the family is a control for regressions: its evidence is far larger than a token."""

    def __init__(
        self,
        *,
        split: str,
        n: int,
        density: str | Sequence[str],
        tasks: Sequence[str] | None = None,
        seed: int = 0,
        qa_per_image: int = 4,
        suffix: str = "",
        max_new_tokens: int = 3,
        metrics: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            split=split,
            n=n,
            qa_per_image=qa_per_image,
            max_new_tokens=max_new_tokens,
            metrics=self.METRICS if metrics is None else metrics,
        )
        densities = densities_of(density, DENSITIES)
        tasks = self.TASKS if tasks is None else tuple(tasks)
        if not tasks or not set(tasks) <= set(self.TASKS):
            raise UserError(f"data.tasks={list(tasks)} must name some of {', '.join(self.TASKS)}")
        self._densities, self._tasks, self._seed, self._suffix = densities, tasks, seed, suffix
        # Refuses too many questions when the dataset is built.
        self._question(0, qa_per_image - 1)

    @classmethod
    def compose(cls, rng: Random, crowd: float) -> Board:
        """A board of the family, with a share `crowd` of the most distractors that it can have."""
        raise NotImplementedError(f"{cls.__name__} must compose its boards")

    @classmethod
    def patchwork(cls, rng: Random) -> Board:
        """A board for training the vision tower on single cells: many stamps, repeated or not."""
        return cls.compose(rng, rng.random())

    @classmethod
    def questions(cls, board: Board, rng: Random) -> Mapping[str, list[Question]]:
        """All questions by subtask, in a random order in which the first answers are balanced."""
        raise NotImplementedError(f"{cls.__name__} must list its questions")

    def _scene(self, picture: int) -> tuple[int, str, int, str]:
        """The arguments of `draw`."""
        number, which = divmod(picture, len(self._densities))
        return self._seed, self.split, number, self._densities[which]

    def picture_id(self, picture: int) -> str:
        seed, split, number, density = self._scene(picture)
        return f"{self.name}-{split}-{seed}-{density}-{number:05d}"

    def sample(self, picture: int, turn: int) -> Sample:
        subtask, question = self._question(picture, turn)
        scene, picture_id = self._scene(picture), self.picture_id(picture)
        return Sample(
            id=f"{picture_id}-{question.text.replace(' ', '-')}",
            dataset=self.name,
            split=self.split,
            load_image=partial(draw_image, type(self), *scene),
            size=(PICTURE_PX, PICTURE_PX),
            question=question.text,
            prompt=question.text + self._suffix,
            answers=(question.answer,),
            subtask=subtask,
            boxes=tuple(map(box_of, question.evidence)),
            meta={"picture": picture_id, "density": scene[-1], "group": "guard" if self.GUARD else "fine"},
        )

    @classmethod
    @lru_cache(maxsize=CACHED_SCENES)
    def draw(cls, seed: int, split: str, index: int, density: str) -> Board:
        """Board number `index` of a split; drawn again until the hash of its content falls into the split's bucket."""
        return cls._attempt(seed, split, index, density, cls._accepted(seed, split, index, density))

    @classmethod
    @lru_cache(maxsize=CACHED_ATTEMPTS)
    def _accepted(cls, seed: int, split: str, index: int, density: str) -> int:
        """The number of the first draw that falls into the split's bucket."""
        for number in range(MAX_ATTEMPTS):
            if cls._attempt(seed, split, index, density, number).digest % 100 in BUCKETS[split]:
                return number
        raise RuntimeError(f"no picture of split {split!r} in {MAX_ATTEMPTS} draws (seed {seed}, index {index})")

    @classmethod
    def _attempt(cls, seed: int, split: str, index: int, density: str, number: int) -> Board:
        rng = generator(cls.name, 1, seed, split, density, index, number)
        return cls.compose(rng, rng.uniform(*DENSITIES[density]))

    @classmethod
    @lru_cache(maxsize=CACHED_SCENES)
    def _asked(cls, seed: int, split: str, index: int, density: str) -> Mapping[str, list[Question]]:
        """All questions about a board; they depend on the board alone."""
        board = cls.draw(seed, split, index, density)
        return cls.questions(board, Random(board.look))

    def _question(self, picture: int, turn: int) -> tuple[str, Question]:
        """Question number `turn` about a picture, and its subtask."""
        nth, which = divmod(turn, len(self._tasks))
        subtask = self._tasks[which]
        asked = self._asked(*self._scene(picture))[subtask]
        if nth >= len(asked):
            raise UserError(
                f"data.qa_per_image={self.questions_per_picture} is more than a picture can answer with tasks "
                f"{list(self._tasks)}: lower it"
            )
        return subtask, asked[nth]


def draw_image(task: type[SynthTask], seed: int, split: str, index: int, density: str) -> Image.Image:
    """The picture of board number `index`."""
    return to_image(task.draw(seed, split, index, density))
