"""`data=synth_list`: glyph pictures with questions about several glyphs, answered in the order of the question."""

import random
from collections.abc import Sequence
from functools import lru_cache, partial

from experiments.data.sample import Sample
from experiments.data.synthetic.glyphs.glyph_dataset import draw_image, scene_of
from experiments.data.synthetic.glyphs.questions import ARGUMENTS, GlyphQuestion, ask
from experiments.data.synthetic.glyphs.render import PICTURE_PX
from experiments.data.synthetic.glyphs.scene import DENSITIES, GlyphScene, keys
from experiments.data.synthetic.synthetic_dataset import CACHED_SCENES, SyntheticDataset, densities_of
from shirg import UserError

LISTS = ("digit", "letter")
"""The tasks whose questions can ask for several glyphs."""
MOST_PIECES = len(ARGUMENTS["digit"])


def lists(scene: GlyphScene, *, n: int, pieces: int, tasks: Sequence[str] = LISTS) -> list[tuple[GlyphQuestion, ...]]:
    """`n` different lists of `pieces` questions about different glyphs, the tasks in turn; they depend on the scene."""
    rng = random.Random(f"lists|{scene.look}")
    words = {"digit": list(ARGUMENTS["digit"]), "letter": keys(scene)}
    found: dict[tuple[str, ...], tuple[GlyphQuestion, ...]] = {}
    while len(found) < n:
        task = tasks[len(found) % len(tasks)]
        asked = rng.sample(words[task], pieces)
        found.setdefault((task, *asked), tuple(ask(scene, task, word) for word in asked))
    return list(found.values())


@lru_cache(maxsize=CACHED_SCENES)
def _asked(
    scene: tuple[int, str, int, str], n: int, pieces: int, tasks: tuple[str, ...]
) -> list[tuple[GlyphQuestion, ...]]:
    return lists(scene_of(*scene), n=n, pieces=pieces, tasks=tasks)


class SynthList(SyntheticDataset):
    """Questions about several glyphs at once: "digit red,blue,white" -> "7 0 7", "letter K,A" -> "green red".

    Pictures and splits are those of `synth_glyphs`; the boxes are those of all pieces, in the order of the question.
    Always label results from it synthetic.

    Args:
        split, n, density, seed, qa_per_image, suffix: as for `synth_glyphs`.
        tasks: "digit", "letter" or both, in turn.
        pieces: glyphs that a question asks for; an answer has twice as many tokens less one, for the spaces.
        max_new_tokens: longest answer in tokens, with the end token.
        metrics: names of `experiments.metrics`; the first is the headline.
    """

    name = "synth_list"

    def __init__(
        self,
        *,
        split: str,
        n: int,
        density: str | Sequence[str],
        tasks: Sequence[str] = LISTS,
        pieces: int = 6,
        seed: int = 0,
        qa_per_image: int = 4,
        suffix: str = "",
        max_new_tokens: int = 12,
        metrics: Sequence[str] = ("word_accuracy", "exact_match", "entity_recall"),
    ) -> None:
        super().__init__(split=split, n=n, qa_per_image=qa_per_image, max_new_tokens=max_new_tokens, metrics=metrics)
        self._densities = densities_of(density, DENSITIES)
        if not tasks or not set(tasks) <= set(LISTS):
            raise UserError(f"data.tasks={list(tasks)} must name some of {', '.join(LISTS)}")
        if not 2 <= pieces <= MOST_PIECES:
            raise UserError(f"data.pieces={pieces}: give 2 to {MOST_PIECES}")
        self._tasks, self._pieces, self._seed, self._suffix = tuple(tasks), pieces, seed, suffix

    def _scene(self, picture: int) -> tuple[int, str, int, str]:
        number, which = divmod(picture, len(self._densities))
        return self._seed, self.split, number, self._densities[which]

    def picture_id(self, picture: int) -> str:
        seed, split, number, density = self._scene(picture)
        return f"{split}-{seed}-{density}-{number:05d}"

    def sample(self, picture: int, turn: int) -> Sample:
        scene, picture_id = self._scene(picture), self.picture_id(picture)
        asked = _asked(scene, self.questions_per_picture, self._pieces, self._tasks)[turn]
        task = asked[0].subtask
        # No spaces between the words: the tokenizer's space is the word for an empty cell, which relevance would find.
        question = f"{task} " + ",".join(one.text.split()[1] for one in asked)
        return Sample(
            id=f"{picture_id}-{question.replace(' ', '-')}",
            dataset=self.name,
            split=self.split,
            load_image=partial(draw_image, *scene, "", 0),
            size=(PICTURE_PX, PICTURE_PX),
            question=question,
            prompt=question + self._suffix,
            answers=(" ".join(one.answer for one in asked),),
            subtask=f"{task}s",
            boxes=tuple(one.box for one in asked),
            meta={"picture": picture_id, "density": scene[-1], "group": "fine"},
        )
