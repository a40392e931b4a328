"""The options of the SHIRG selector, their values, and the combinations that are refused.

docs/method.md, "Terms", explains each option.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from shirg.budget import Budget, Share, check_part
from shirg.features import Geometry, PictureCounts, TokenLayout
from shirg.selection import Stage
from shirg.validation import OptionBlock, UserError, one_of

Views = Literal["tiles", "all"]
VarianceOf = Literal["channels", "neighbourhood"]
EdgeSpace = Literal["features", "pixels"]
Metric = Literal["feature_l2", "feature_cos", "local_var", "position"]
Norm = Literal["zscore", "minmax", "rank", "none"]
NormScope = Literal["image", "view"]
CropTerm = Literal["none", "border", "centre", "literal"]
Dedup = Literal["relevance", "border", "mean"]
ScaffoldSource = Literal["global", "canvas"]
Newline = Literal["none", "row"]
Underflow = Literal["global", "mask", "raise"]
CoordKind = Literal["none", "sincos_linear"]


@dataclass(frozen=True, repr=False)
class Weights(OptionBlock):
    """How much each term of the score counts."""

    similarity: float = 0.65
    neighbour: float = 0.25
    crop: float = 0.10
    centre: float = 0.0
    variance: float = 0.0
    edge: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"weights.{name}={value}: give a number >= 0; neighbour.sign sets the sign")


@dataclass(frozen=True, repr=False)
class Neighbour(OptionBlock):
    """The neighbour term: which distance, and whether a large one lowers (-1) or raises (+1) a token's score."""

    metric: Metric = "feature_l2"
    sign: int = -1

    def __post_init__(self) -> None:
        one_of("neighbour.metric", self.metric, Metric)
        one_of("neighbour.sign", self.sign, Literal[-1, 1])


@dataclass(frozen=True, repr=False)
class Scaffold(OptionBlock):
    """The coarse picture in front: size x size means (0 for none) of `source`, before or after the projector.

    "auto" is 8, or the side of the base model's own pooled view where that is smaller (half a view where it is not
    known). A share such as "1/6" is that
    share of the source's cells per side, rounded up, so that it means the same on every model.
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
            raise UserError("scaffold.source and scaffold.space have no effect while scaffold.size is 0")

    @property
    def _share(self) -> tuple[int, int] | None:
        """A share as (numerator, denominator); None when `size` is not a share of at most 1."""
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
            pooled = -(-min(layout.view_shape) // 2) if layout.pooling is None else layout.pooling.side
            return min(8, pooled)
        cells = min(layout.view_shape if self.source == "global" else layout.canvas)
        return -(-share[0] * cells // share[1])


@dataclass(frozen=True, repr=False)
class Merging(OptionBlock):
    """Whether similar neighbours are merged before selection, and which share of the canvas cells is merged away."""

    mode: Literal["none", "tome"] = "none"
    share: float = 0.25

    def __post_init__(self) -> None:
        one_of("merge.mode", self.mode, Literal["none", "tome"])
        if not 0 < self.share <= 0.5:
            raise UserError(f"merge.share={self.share}: give a share above 0 and up to 0.5 of the cells")
        if self.mode == "none" and self.share != Merging.share:
            raise UserError("merge.share has no effect with merge.mode=none; leave it at its default")

    def count(self, layout: TokenLayout) -> int:
        """How many cells of this layout may be merged away."""
        rows, cols = layout.finest[1]
        return Share.of(self.share).down(rows * cols) if self.mode == "tome" else 0

    def loss(self, layout: TokenLayout, known: PictureCounts, *, fills: bool) -> int:
        """How many tokens of a picture there are less to choose from, at most.

        `fills`: whether duplicates are chosen too. Those of a cell that holds a mean are not.
        """
        joined = min(self.count(layout), known.joinable)
        return joined + (known.doubled if fills and joined else 0)


@dataclass(frozen=True, repr=False)
class Diversity(OptionBlock):
    """Whether tokens are picked one by one, by score minus `weight` x the largest cosine to those picked before."""

    mode: Literal["none", "mmr"] = "none"
    weight: float = 1.0

    def __post_init__(self) -> None:
        one_of("diversity.mode", self.mode, Literal["none", "mmr"])
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"diversity.weight={self.weight}: give a number above 0")
        if self.mode == "none" and self.weight != Diversity.weight:
            raise UserError("diversity.weight has no effect with diversity.mode=none; leave it at its default")


@dataclass(frozen=True, repr=False)
class Allocation(OptionBlock):
    """Whether all K tokens are taken by score ("ranked"), or the best few, the rest evenly over the canvas.

    `evidence`: how many are taken by score, a number of tokens or (below 1) a share of those that a picture keeps.
    `mass`: only the fewest of them that hold this share of the softmax of all scores; None: all of them.
    """

    mode: Literal["ranked", "evidence_context"] = "ranked"
    evidence: float = 0.5
    mass: float | None = None

    def __post_init__(self) -> None:
        one_of("allocation.mode", self.mode, Literal["ranked", "evidence_context"])
        check_part("allocation.evidence", self.evidence)
        if self.mass is not None and not 0 < self.mass < 1:
            raise UserError(f"allocation.mass={self.mass}: give a share between 0 and 1, or null")
        for name in ("evidence", "mass"):
            if self.mode == "ranked" and getattr(self, name) != getattr(Allocation, name):
                raise UserError(f"allocation.{name} has no effect with allocation.mode=ranked; leave it at its default")

    def count_B(self, keep_B: Tensor) -> Tensor:
        """int64 [B]: how many of the tokens that each picture keeps are taken by score, at least 1."""
        if isinstance(self.evidence, int):
            return keep_B.clamp_max(self.evidence)
        return Share.of(self.evidence).nearest(keep_B).clamp_min(1)


@dataclass(frozen=True, repr=False)
class Adaptive(OptionBlock):
    """Whether a picture may keep fewer than its K tokens: the smallest of `levels`, shares of its K, that is enough.

    "entropy": a level is enough when it holds the effective number of relevant tokens at `temperature`. "head": when a
    trained head predicts a loss that is at most `tolerance` above that of all K.
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
            raise UserError("adaptive.levels has no effect with adaptive.mode=none; leave it at its default")
        for name, mode in (("temperature", "entropy"), ("tolerance", "head")):
            if self.mode != mode and getattr(self, name) != getattr(Adaptive, name):
                raise UserError(f"adaptive.{name} has no effect with adaptive.mode={self.mode}; it is for mode={mode}")


SINGLE_GEOMETRIES = ("single_672", "single_512")
"""Geometries of one view of the whole picture."""


@dataclass(frozen=True, kw_only=True)
class ShirgOptions:
    """All options of `ShirgSelector`, whose docstring explains them.

    Raises:
        UserError: a value that an option does not have, or options that have no effect or contradict each other.
    """

    budget: Budget
    geometry: Geometry = "lavida_tiles"
    views: Views = "tiles"
    weights: Weights = field(default_factory=Weights)
    neighbour: Neighbour = field(default_factory=Neighbour)
    variance_of: VarianceOf = "channels"
    edge_space: EdgeSpace = "features"
    norm: Norm = "zscore"
    norm_scope: NormScope = "image"
    mask_padding: bool = True
    crop_term: CropTerm = "none"
    dedup: Dedup = "relevance"
    coverage: int = 0
    merge: Merging = field(default_factory=Merging)
    diversity: Diversity = field(default_factory=Diversity)
    allocation: Allocation = field(default_factory=Allocation)
    adaptive: Adaptive = field(default_factory=Adaptive)
    scaffold: Scaffold = field(default_factory=Scaffold)
    summary: bool = False
    newline: Newline = "none"
    underflow: Underflow = "global"
    coord_embed: CoordKind = "none"
    coord_width: int | None = None

    def __post_init__(self) -> None:
        for name, literal in CHOICES.items():
            one_of(name, getattr(self, name), literal)
        if not isinstance(self.coverage, int) or self.coverage < 0:
            raise UserError(f"coverage={self.coverage!r}: give the side of a region in cells, or 0 for none")
        for holds, message in CONFLICTS:
            if holds(self):
                raise UserError(message.format(o=self))

    @property
    def overlaps(self) -> bool:
        """Whether several views of this geometry share canvas cells."""
        return self.geometry == "seed_canvas48"

    @property
    def has_global(self) -> bool:
        """Whether this geometry has a view of the whole picture beside the canvas."""
        return self.geometry in ("lavida_tiles", "fovea")

    @property
    def has_terms(self) -> bool:
        """Whether any term of the score has a weight."""
        weights = self.weights
        used = (weights.similarity, weights.neighbour, weights.centre, weights.variance, weights.edge)
        return any(used) or self.crop_term != "none"


CHOICES: dict[str, Any] = {
    "views": Views,
    "variance_of": VarianceOf,
    "edge_space": EdgeSpace,
    "norm": Norm,
    "norm_scope": NormScope,
    "crop_term": CropTerm,
    "dedup": Dedup,
    "newline": Newline,
    "underflow": Underflow,
    "coord_embed": CoordKind,
}
"""The values of each option that is one of several words."""

CONFLICTS: tuple[tuple[Callable[[ShirgOptions], bool], str], ...] = (
    (
        lambda o: o.crop_term == "centre" and not o.overlaps,
        "crop_term=centre: only geometry=seed_canvas48 has a centre crop; choose none, border or literal",
    ),
    (
        lambda o: o.crop_term == "literal" and not (o.overlaps or o.geometry == "lavida_tiles"),
        "crop_term=literal numbers the views of the canvas, and geometry={o.geometry} has one; choose none or border",
    ),
    (
        lambda o: o.crop_term != "none" and o.weights.crop == 0,
        "crop_term={o.crop_term} has no effect while weights.crop is 0; choose crop_term=none or raise weights.crop",
    ),
    (
        # 0 says the same as no term.
        lambda o: o.crop_term == "none" and o.weights.crop not in (0, Weights.crop),
        "weights.crop={o.weights.crop} has no effect with crop_term=none; choose another crop_term, or leave it at its "
        "default (0.1)",
    ),
    (
        lambda o: o.weights.neighbour == 0 and o.neighbour != Neighbour(),
        "neighbour.metric and neighbour.sign have no effect while weights.neighbour is 0; raise it, or leave them at "
        "their defaults (feature_l2, -1)",
    ),
    (
        lambda o: not o.has_terms,
        "all weights in use are 0: there is nothing to rank by; raise one of weights.*",
    ),
    (
        lambda o: o.variance_of != "channels" and o.weights.variance == 0,
        "variance_of has no effect while weights.variance is 0; leave it at its default (channels)",
    ),
    (
        lambda o: o.edge_space != "features" and o.weights.edge == 0,
        "edge_space has no effect while weights.edge is 0; leave it at its default (features)",
    ),
    (
        lambda o: o.norm == "none" and o.norm_scope != "image",
        "norm_scope has no effect when norm=none; leave it at its default (image)",
    ),
    (
        lambda o: o.norm_scope == "view" and o.geometry != "lavida_tiles",
        "norm_scope=view: geometry={o.geometry} has no tiles with statistics of their own; choose norm_scope=image",
    ),
    (
        lambda o: o.views == "all" and not o.has_global,
        "views=all: geometry={o.geometry} has no global view beside the canvas; choose views=tiles",
    ),
    (
        lambda o: o.underflow == "raise" and o.views == "all",
        "underflow=raise has no effect with views=all, which always refuses too few tokens; choose global or mask",
    ),
    (
        lambda o: not o.mask_padding and o.geometry in SINGLE_GEOMETRIES,
        "mask_padding=False: geometry={o.geometry} fills its view and has no padding; leave it at its default (true)",
    ),
    (
        lambda o: o.underflow != "global" and o.geometry in SINGLE_GEOMETRIES,
        "underflow={o.underflow}: geometry={o.geometry} has no padding and so never too few tokens; "
        "leave it at its default (global)",
    ),
    (
        lambda o: o.dedup != "relevance" and not o.overlaps,
        "dedup={o.dedup}: only the crops of geometry=seed_canvas48 share cells; choose dedup=relevance",
    ),
    (
        lambda o: o.dedup == "mean" and o.underflow != "mask",
        "dedup=mean averages duplicates, so underflow={o.underflow} has nothing to fill with; use underflow=mask",
    ),
    (
        lambda o: o.dedup == "mean" and o.merge.mode != "none",
        "dedup=mean and merge.mode=tome both average tokens; choose one of them",
    ),
    (
        lambda o: o.diversity.mode != "none" and o.coverage > 0,
        "diversity.mode=mmr cannot guarantee coverage; choose coverage=0 or diversity.mode=none",
    ),
    (
        lambda o: o.allocation.mode != "ranked" and o.coverage > 0,
        "allocation.mode=evidence_context spreads tokens itself; choose coverage=0 or allocation.mode=ranked",
    ),
    (
        lambda o: o.allocation.mode != "ranked" and o.views == "all",
        "allocation.mode=evidence_context spreads tokens over the canvas; choose views=tiles or allocation.mode=ranked",
    ),
    (
        lambda o: o.scaffold.size != 0 and o.scaffold.source == "global" and not o.has_global,
        "scaffold.source=global: geometry={o.geometry} has no global view; choose scaffold.source=canvas",
    ),
    (
        lambda o: o.underflow == "raise" and o.budget == "matched",
        "underflow=raise needs a budget in numbers; with budget=matched choose global or mask",
    ),
    (
        lambda o: o.underflow == "raise" and o.overlaps,
        "underflow=raise cannot count the cells of overlapping crops before selection; choose global or mask",
    ),
    (
        lambda o: (o.coord_embed == "none") != (o.coord_width is None),
        "coord_embed=sincos_linear and coord_width (the tokens' width) go together: set both or none",
    ),
)
"""Combinations that are refused: a condition, and the message, formatted with the options as `o`."""
