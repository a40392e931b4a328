"""`data=synth_mix`: several families of synthetic tasks in one dataset, so many pictures of each in a round."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.data.sample import Sample
from experiments.data.synthetic.board_task import SynthTask
from experiments.data.synthetic.chart import SynthChart
from experiments.data.synthetic.doc import SynthDoc
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.data.synthetic.grid import SynthGrid
from experiments.data.synthetic.shapes import SynthShapes
from experiments.data.synthetic.synthetic_dataset import SyntheticDataset
from shirg import UserError

FAMILIES: dict[str, type[SynthTask]] = {
    "chart": SynthChart,
    "doc": SynthDoc,
    "grid": SynthGrid,
    "shapes": SynthShapes,
}
"""By the name of their dataset without "synth_"."""
GLYPHS = "glyphs"


class SynthMix(SyntheticDataset):
    """Rounds of pictures with a fixed number of each family.

    Args:
        shares: pictures of each family in a round; families are "glyphs", "chart", "doc", "grid" and "shapes".
        split, n, density, seed, qa_per_image, suffix, max_new_tokens: as the families' own. All five know the densities
            "sparse" and "dense"; questions stay together by picture and pictures are those that the family alone would
            draw.
        metrics: names of `experiments.metrics` for answers of every family.

    Samples keep the name of their own dataset; sample.meta["group"] is the family, or for glyphs their own group.
    """

    name = "synth_mix"

    def __init__(
        self,
        *,
        shares: Mapping[str, int],
        split: str,
        n: int,
        density: str | Sequence[str],
        seed: int = 0,
        qa_per_image: int = 3,
        suffix: str = "",
        max_new_tokens: int = 3,
        metrics: Sequence[str] = ("exact_match", "entity_recall"),
    ) -> None:
        known = (GLYPHS, *FAMILIES)
        for unknown in set(shares).difference(known):
            raise UserError(f"data.shares.{unknown} does not exist: choose from {', '.join(known)}")
        if any(share < 0 for share in shares.values()) or not any(shares.values()):
            raise UserError(f"data.shares={dict(shares)} must be numbers of pictures, not all of them 0")
        super().__init__(split=split, n=n, qa_per_image=qa_per_image, max_new_tokens=max_new_tokens, metrics=metrics)
        self._round = [(family, i) for family in known for i in range(shares.get(family, 0))]
        self._shares = dict(shares)
        options: dict[str, Any] = {"split": split, "n": n, "seed": seed, "qa_per_image": qa_per_image, "suffix": suffix}
        options |= {"max_new_tokens": max_new_tokens, "metrics": metrics, "density": density}
        self._parts: dict[str, SyntheticDataset] = {
            family: (SynthGlyphs if family == GLYPHS else FAMILIES[family])(**options) for family, _ in self._round
        }

    def _origin(self, picture: int) -> tuple[str, int]:
        """The family of a picture, and its number there."""
        rounds, place = divmod(picture, len(self._round))
        family, nth = self._round[place]
        return family, rounds * self._shares[family] + nth

    def picture_id(self, picture: int) -> str:
        family, own = self._origin(picture)
        return self._parts[family].picture_id(own)

    def sample(self, picture: int, turn: int) -> Sample:
        family, own = self._origin(picture)
        sample = self._parts[family].sample(own, turn)
        return sample if family == GLYPHS else replace(sample, meta={**sample.meta, "group": family})
