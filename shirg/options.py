"""The options of the SHIRG selector and their values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shirg.errors import UserError, one_of
from shirg.features import TokenLayout
from shirg.selection import Stage

VarianceOf = Literal["channels", "neighbourhood"]
EdgeSpace = Literal["features", "pixels"]


Metric = Literal["feature_l2", "feature_cos", "local_var", "position"]
Norm = Literal["zscore", "minmax", "rank", "none"]
CropTerm = Literal["none", "border", "centre", "literal"]


Dedup = Literal["relevance", "border", "mean"]


ScaffoldSource = Literal["global", "canvas"]


NormScope = Literal["image", "view"]
Newline = Literal["none", "row"]
Underflow = Literal["global", "mask", "raise"]
CoordKind = Literal["none", "sincos_linear"]
Views = Literal["tiles", "all"]


@dataclass(frozen=True)
class Weights:
    """How much each term of the score counts."""

    similarity: float = 0.65
    neighbor: float = 0.25
    crop: float = 0.10
    centre: float = 0.0
    variance: float = 0.0
    edge: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"weights.{name}={value}: give a number >= 0; the sign is neighbor.sign's")


@dataclass(frozen=True)
class Neighbor:
    """The neighbour term: which distance, and whether it is held against a token (-1) or for it (+1)."""

    metric: Metric = "feature_l2"
    sign: int = -1

    def __post_init__(self) -> None:
        one_of("neighbor.metric", self.metric, Metric)
        one_of("neighbor.sign", self.sign, Literal[-1, 1])


@dataclass(frozen=True)
class Scaffold:
    """The coarse picture in front: size x size means (0 for none), of what, before or after the projector.

    "auto" is 8, or the side of the base model's own pooled view where that is smaller. A share such as "1/6" is that
    part of the source's cells a side, rounded up, so that it means the same on every model.
    """

    size: int | str = "auto"
    source: ScaffoldSource = "global"
    space: Stage = "pre"

    def __post_init__(self) -> None:
        is_side = isinstance(self.size, int) and not isinstance(self.size, bool) and self.size >= 0
        if self.size != "auto" and not is_side and self._share is None:
            raise UserError(
                f"scaffold.size={self.size!r}: give the tokens per side, 0 for no scaffold, auto, or a share like '1/6'"
            )
        one_of("scaffold.source", self.source, ScaffoldSource)
        one_of("scaffold.space", self.space, Stage)
        if self.size == 0 and (self.source, self.space) != ("global", "pre"):
            raise UserError("scaffold.source and scaffold.space mean nothing while scaffold.size is 0")

    @property
    def _share(self) -> tuple[int, int] | None:
        """A share as (numerator, denominator); None when `size` is no share of at most 1."""
        top, slash, bottom = str(self.size).partition("/")
        if not (slash and top.isdigit() and bottom.isdigit()):
            return None
        return (int(top), int(bottom)) if 0 < int(top) <= int(bottom) else None

    def side(self, layout: TokenLayout) -> int:
        """Scaffold tokens per side on this layout."""
        if isinstance(self.size, int):
            return self.size
        share = self._share
        if share is None:
            return min(8, layout.pooling.side)
        cells = layout.side if self.source == "global" else min(layout.canvas)
        return -(-share[0] * cells // share[1])


@dataclass(frozen=True)
class Merging:
    """Whether similar neighbours are merged before the choice, and which share of the canvas cells goes."""

    mode: Literal["none", "tome"] = "none"
    share: float = 0.25

    def __post_init__(self) -> None:
        one_of("merge.mode", self.mode, Literal["none", "tome"])
        if not 0 < self.share <= 0.5:
            raise UserError(f"merge.share={self.share}: give a share above 0 and up to 0.5 of the cells")
        if self.mode == "none" and self.share != Merging.share:
            raise UserError("merge.share means nothing with merge.mode=none")

    def count(self, layout: TokenLayout) -> int:
        """How many cells of this layout may go."""
        rows, cols = layout.finest[1]
        return int(self.share * rows * cols) if self.mode == "tome" else 0


@dataclass(frozen=True)
class Diversity:
    """Whether tokens are picked one by one, each less `weight` x its largest cosine to those picked before."""

    mode: Literal["none", "mmr"] = "none"
    weight: float = 1.0

    def __post_init__(self) -> None:
        one_of("diversity.mode", self.mode, Literal["none", "mmr"])
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"diversity.weight={self.weight}: give a number above 0")
        if self.mode == "none" and self.weight != Diversity.weight:
            raise UserError("diversity.weight means nothing with diversity.mode=none")


@dataclass(frozen=True)
class Adaptive:
    """Whether a picture may keep fewer tokens: the first of `levels`, shares of K, that is enough.

    "entropy": that holds what is relevant at `temperature`; "head": whose loss a trained head expects to be at most
    `tolerance` above that of all K.
    """

    mode: Literal["none", "entropy", "head"] = "none"
    levels: Sequence[float] = (0.5, 0.75, 1.0)
    temperature: float = 0.3
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        one_of("adaptive.mode", self.mode, Literal["none", "entropy", "head"])
        object.__setattr__(self, "levels", tuple(self.levels))
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not rising or self.levels[0] <= 0 or self.levels[-1] != 1:
            raise UserError(f"adaptive.levels={list(self.levels)}: give rising shares of the budget that end with 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"adaptive.temperature={self.temperature}: give a number above 0")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise UserError(f"adaptive.tolerance={self.tolerance}: give a number >= 0")
        if self.mode == "none" and self.levels != Adaptive.levels:
            raise UserError("adaptive.levels means nothing with adaptive.mode=none")
        for knob, mode in (("temperature", "entropy"), ("tolerance", "head")):
            if self.mode != mode and getattr(self, knob) != getattr(Adaptive, knob):
                raise UserError(f"adaptive.{knob} means nothing with adaptive.mode={self.mode}; it is for {mode}")
