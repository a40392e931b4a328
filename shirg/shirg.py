"""SHIRG: score the tokens, keep the best, let a coarse picture and a summary stand for the rest.

docs/method.md, "Terms", defines every term; its section "Variants" says which knobs make which of the notes' methods.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from shirg.adaptive import AdaptiveHead, adaptive_budget
from shirg.budget import Budget
from shirg.coords import CoordEmbed
from shirg.dedup import CellAssignment, assign_cells, average_cells
from shirg.errors import UserError, one_of, option_group
from shirg.features import Geometry, TokenLayout, VisionFeatures
from shirg.layouts import layout_tables, regions
from shirg.merging import cell_means, match
from shirg.options import (
    Adaptive,
    CoordKind,
    CropTerm,
    Dedup,
    Diversity,
    EdgeSpace,
    Merging,
    Neighbor,
    Newline,
    Norm,
    NormScope,
    Scaffold,
    Underflow,
    VarianceOf,
    Views,
    Weights,
)
from shirg.scaffold import close_rows, scaffold_tokens, summary_token, used_rows
from shirg.scoring import ScoreTerms
from shirg.selection import Selection, Selector, assert_finite, join, keep
from shirg.topk import boost_representatives, marginal_relevance, tiers

if TYPE_CHECKING:
    pass


class ShirgSelector(Selector):
    """The family of SHIRG gates; the defaults are SHIRG-980 with its published formula on LaViDa's own tiles.

    score = similarity z(relevance) + sign neighbor z(distance to the 8-neighbours) - crop c - centre z(distance from
    the centre) + variance z(variance) + edge z(edges), each with its weight.

    The best K = budget - scaffold - summary tokens stay, in reading order, behind the scaffold tokens and before the
    summary. Scores are float32 and carry no gradient; tokens, scaffold and summary do.

    Args:
        budget: tokens per picture, everything included; "matched": as many as the base model would use for it.
        geometry: how the picture is cut into views.
        views: "tiles": the global view only fills up; "all": it competes with the tiles.
        weights: `similarity`, `neighbor`, `crop`, `centre`, `variance` and `edge`, each >= 0.
        neighbor: `metric` and `sign`; -1 is the published sign, +1 prefers tokens unlike their surroundings.
        variance_of: over the token's "channels", or over its "neighbourhood".
        edge_space: edges of "features" between tokens, or of "pixels" inside a patch (needs the tap "pixels").
        norm: how the terms are made comparable; "none" is the formula as printed.
        norm_scope: "image" takes statistics over all tiles of a picture, "view" over each tile.
        mask_padding: letterbox padding can neither be kept nor counted. False is the literal reading.
        crop_term: "none", "border", "centre" or "literal".
        dedup: which of the tokens of overlapping crops gets a cell: the most relevant, the one deepest inside its crop
            ("border"), or their "mean".
        coverage: side in cells of the regions that each keep their best token; 0 for none.
        merge: `mode` "tome" merges the most similar neighbours, a `share` of the cells, before the choice.
        diversity: `mode` "mmr" picks one by one, each less `weight` x its largest cosine to those before; slow.
        adaptive: `mode` "entropy" lets a picture keep the first of `levels` (shares of K) that holds what is relevant,
            "head" the first that a head, which has to be trained, expects to be as good as all K.
        scaffold: `size`, `source` and `space`; "post" pools projected tokens and turns this into a selector of stage
            "post", which needs the tap "encoder" to score by.
        summary: a last token, the mean of all that were not kept.
        newline: "row" adds a NEWLINE slot to each canvas row that is not padding. They come on top of a budget in
            numbers and inside a matched one, which counts the base model's newlines too.
        underflow: where a picture has too few tokens: "global" fills up from the global view, then with the doubles of
            overlapping crops, by score; "mask" leaves slots unused, "raise" refuses.
        coord_embed: "sincos_linear" adds a trained embedding of each token's box; it starts at zero.
        coord_width: width of the tokens that `coord_embed` is added to.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        geometry: Geometry = "lavida_tiles",
        views: Views = "tiles",
        weights: Mapping[str, float] | None = None,
        neighbor: Mapping[str, Any] | None = None,
        variance_of: VarianceOf = "channels",
        edge_space: EdgeSpace = "features",
        norm: Norm = "zscore",
        norm_scope: NormScope = "image",
        mask_padding: bool = True,
        crop_term: CropTerm = "none",
        dedup: Dedup = "relevance",
        coverage: int = 0,
        merge: Mapping[str, Any] | None = None,
        diversity: Mapping[str, Any] | None = None,
        adaptive: Mapping[str, Any] | None = None,
        scaffold: Mapping[str, Any] | None = None,
        summary: bool = False,
        newline: Newline = "none",
        underflow: Underflow = "global",
        coord_embed: CoordKind = "none",
        coord_width: int | None = None,
    ) -> None:
        super().__init__(budget=budget, geometry=geometry)
        self.weights = option_group("weights", weights, Weights)
        self.neighbor = option_group("neighbor", neighbor, Neighbor)
        self.merge = option_group("merge", merge, Merging)
        self.diversity = option_group("diversity", diversity, Diversity)
        self.adaptive = option_group("adaptive", adaptive, Adaptive)
        self.scaffold = option_group("scaffold", scaffold, Scaffold)
        for name, value, allowed in (
            ("views", views, Views),
            ("variance_of", variance_of, VarianceOf),
            ("edge_space", edge_space, EdgeSpace),
            ("norm", norm, Norm),
            ("norm_scope", norm_scope, NormScope),
            ("crop_term", crop_term, CropTerm),
            ("dedup", dedup, Dedup),
            ("newline", newline, Newline),
            ("underflow", underflow, Underflow),
            ("coord_embed", coord_embed, CoordKind),
        ):
            one_of(name, value, allowed)
        if not isinstance(coverage, int) or coverage < 0:
            raise UserError(f"coverage={coverage!r}: give the side of a region in cells, or 0 for none")
        self.views: Views = views
        self.variance_of: VarianceOf = variance_of
        self.edge_space: EdgeSpace = edge_space
        self.norm: Norm = norm
        self.norm_scope: NormScope = norm_scope
        self.mask_padding = mask_padding
        self.crop_term: CropTerm = crop_term
        self.dedup: Dedup = dedup
        self.coverage = coverage
        self.summary = summary
        self.newline: Newline = newline
        self.underflow: Underflow = underflow
        refuse_idle_knobs(self)
        self.stage = self.scaffold.space
        pixels = {"pixels"} if self.weights.edge and edge_space == "pixels" else set()
        self.needs = frozenset(pixels | ({"encoder"} if self.stage == "post" else set()))
        self.uses_relevance = self.weights.similarity > 0 or (dedup == "relevance" and geometry == "seed_canvas48")
        # A scaffold of the canvas has no token for a window that is padding alone.
        padded = self.scaffold.source == "canvas" and geometry in ("lavida_tiles", "seed_canvas48")
        self.may_use_less = underflow == "mask" or self.adaptive.mode != "none" or padded
        if (coord_embed == "none") != (coord_width is None):
            raise UserError(
                "coord_embed=sincos_linear and coord_width (the tokens' width) go together: set both or none"
            )
        self.coords = None if coord_width is None else CoordEmbed(width=coord_width)
        self.head = AdaptiveHead(self.adaptive) if self.adaptive.mode == "head" else None
        self.level: int | None = None

    def at_level(self, level: int) -> Self:
        """This gate, parameters shared, with all pictures at one of `adaptive.levels`: what its head trains with."""
        fixed = copy.copy(self)
        fixed.level = level
        return fixed

    def select(self, features: VisionFeatures) -> Selection:
        layout, side = features.layout, self.scaffold.side(features.layout)
        usable_BN = features.valid_BN if self.mask_padding else torch.ones_like(features.valid_BN)
        rows_BR = used_rows(layout, usable_BN)
        features = average_cells(features) if self.dedup == "mean" else features
        with torch.no_grad():
            k, keep_B = self.resolve_budget(features)
            if self.newline == "row" and self.budget == "matched":
                keep_B = (keep_B - rows_BR.sum(-1)).clamp_min(0)
            seats = assign_cells(layout, usable_BN, features.relevance_BN, self.dedup)
            ranks_global = self._ranks_global(features, k)
            scores_BP = self._terms.score(features, self._states(features), seats, ranks_global)
            assert_finite(scores_BP, seats.usable_BP, type(self).__name__)
            for row_P, ranks in zip(scores_BP, ranks_global, strict=True):
                row_P[: 0 if ranks else layout.n_global] = -torch.inf
            merge, competing, competing_BP = None, seats, scores_BP
            if self.merge.mode == "tome":
                merge = match(layout, self._states(features), seats, self.merge.count(layout))
                competing, competing_BP = merge.competitors(seats), merge.best(scores_BP)
        first = self._first(layout)
        deserved_B, expected_B = adaptive_budget(
            self.adaptive, self.head, self.level, competing_BP[:, first:], competing.usable_BP[:, first:], k
        )
        with torch.no_grad():
            ranked_BK, available_B = self._rank(features, competing, competing_BP, usable_BN, k)
            keep_B = torch.minimum(torch.minimum(keep_B, deserved_B), available_B)
        scores_BN = scores_BP[:, layout_tables(layout).place_N]
        means = None if merge is None else merge.means(features, seats)
        if self.dedup == "mean":
            means = cell_means(features)
        chosen = keep(features if means is None else means.features, ranked_BK, keep_B, scores_BN=scores_BN)
        kept_BK = torch.arange(k, device=ranked_BK.device) < keep_B[:, None]
        taken_BN = torch.zeros_like(usable_BN).scatter(1, ranked_BK, kept_BK)
        if self.newline == "row":
            chosen = close_rows(chosen, features, rows_BR)
        if means is not None:
            chosen = means.marked(chosen)
        parts = [self._with_coords(chosen)]
        if side:
            parts.insert(0, self._with_coords(scaffold_tokens(features, seats, side, self.scaffold.source)))
        if self.summary:
            parts.append(self._with_coords(summary_token(features, usable_BN, taken_BN)))
        return replace(join(*parts), scores_BN=scores_BN, expected_B=expected_B)

    def score(self, features: VisionFeatures) -> Tensor:
        """Scores [B, N] of all tokens, padding included; tokens that share a cell have the score of its winner."""
        usable_BN = features.valid_BN if self.mask_padding else torch.ones_like(features.valid_BN)
        seats = assign_cells(features.layout, usable_BN, features.relevance_BN, self.dedup)
        everywhere = (True,) * len(features.ids)
        scores_BP = self._terms.score(features, self._states(features), seats, everywhere)
        return scores_BP[:, layout_tables(features.layout).place_N]

    def _states(self, features: VisionFeatures) -> Tensor:
        """The encoder states, which are what is scored."""
        return features.taps["encoder"] if self.stage == "post" else features.tokens_BND

    @property
    def _terms(self) -> ScoreTerms:
        return ScoreTerms(
            weights=self.weights,
            neighbor=self.neighbor,
            variance_of=self.variance_of,
            edge_space=self.edge_space,
            norm=self.norm,
            norm_scope=self.norm_scope,
            crop_term=self.crop_term,
        )

    def _first(self, layout: TokenLayout) -> int:
        """The first place that competes; those before it only fill up."""
        return layout.n_global if self.views == "tiles" and layout.canvas != (0, 0) else 0

    def _ranks_global(self, features: VisionFeatures, k: int) -> tuple[bool, ...]:
        """Whether each picture's global view must be ranked: it competes, or the picture may have too few tile tokens.

        Known on the host, and picture by picture, so that no choice depends on a batch-mate.
        """
        layout = features.layout
        if not self._first(layout):
            return (True,) * len(features.ids)
        usable = features.n_valid if self.mask_padding else (layout.n_tokens,) * len(features.ids)
        return tuple(n - layout.n_global - self.merge.count(layout) < k for n in usable)

    def _rank(
        self, features: VisionFeatures, seats: CellAssignment, scores_BP: Tensor, usable_BN: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, k], best first, and how many there are to choose from [B]."""
        layout = features.layout
        first, fills = self._first(layout), self.underflow == "global"
        token_BX, usable_BX, worth_BX = seats.token_BP[:, first:], seats.usable_BP[:, first:], scores_BP[:, first:]
        if self.coverage:
            region_RL = regions(layout, self.coverage, first)
            if self.budget != "matched" and len(region_RL) > k:
                raise UserError(
                    f"coverage={self.coverage} has {len(region_RL)} regions to cover, but only {k} tokens are kept; "
                    "raise coverage or budget"
                )
            worth_BX = boost_representatives(worth_BX, usable_BX, region_RL - first)
        if self.diversity.mode == "mmr":
            states_BXD = seats.take(self._states(features))[:, first:]
            picks = min(k, worth_BX.shape[1])
            worth_BX = marginal_relevance(worth_BX, usable_BX, states_BXD, picks, self.diversity.weight)
        groups = [(token_BX, worth_BX, usable_BX)]
        if first and any(self._ranks_global(features, k)):
            groups.append((seats.token_BP[:, :first], scores_BP[:, :first], seats.usable_BP[:, :first] & fills))
        if seats.shared:
            order_BN = layout.order_N.expand_as(usable_BN)
            won_BN = torch.zeros_like(usable_BN).scatter(1, seats.token_BP, True)
            spare_BN = usable_BN & ~won_BN & (fills and self.dedup != "mean")
            worth_BN = scores_BP[:, layout_tables(layout).place_N].gather(1, order_BN)
            groups.append((order_BN, worth_BN, spare_BN.gather(1, order_BN)))
        return tiers(groups, k)

    def resolve_budget(self, features: VisionFeatures) -> tuple[int, Tensor]:
        """What scaffold and summary leave of the budget: the static K and the count [B] that each picture keeps."""
        taken = self._synthesised(features.layout)
        least = features.layout.pooling.side**2 if self.budget == "matched" else self.budget
        if least is not None and taken > least:
            raise UserError(
                f"scaffold.size={self.scaffold.size} takes {taken} tokens, but budget={self.budget} can be as small as "
                f"{least}; lower scaffold.size or raise budget"
            )
        total, count_B = super().resolve_budget(features)
        return total - taken, count_B - taken

    def _synthesised(self, layout: TokenLayout) -> int:
        return self.scaffold.side(layout) ** 2 + self.summary

    def check_count(self, features: VisionFeatures, wanted: int) -> None:
        """Raises when a picture has fewer tokens to choose from than scaffold and summary leave of the budget."""
        layout, taken = features.layout, self._synthesised(features.layout)
        only_tiles = self.underflow == "raise" and self._first(layout) > 0
        for sample, n in zip(features.ids, features.n_valid, strict=True):
            have = n if self.mask_padding and self.underflow != "mask" else layout.n_tokens
            have -= (layout.n_global if only_tiles else 0) + self.merge.count(layout)
            if have < wanted - taken:
                raise UserError(
                    f"{type(self).__name__}: budget {wanted} less {taken} for the scaffold asks for {wanted - taken} "
                    f"tokens, but picture {sample!r} has {have} {'tile ' if only_tiles else ''}tokens to choose from; "
                    f"lower budget=, or choose budget=matched or underflow={'global' if only_tiles else 'mask'}"
                )

    def _with_coords(self, selection: Selection) -> Selection:
        return selection if self.coords is None else self.coords.added_to(selection)


SINGLE = ("single_672", "single_512")
"""Geometries of one view of the whole picture."""
HAS_GLOBAL = ("lavida_tiles", "fovea")
"""Geometries with a view of the whole picture beside the canvas."""


def refuse_idle_knobs(gate: "ShirgSelector") -> None:
    """Raises UserError, in one sentence, for knobs that have no effect beside the others."""
    weights, overlaps = gate.weights, gate.geometry == "seed_canvas48"
    has_global = gate.geometry in HAS_GLOBAL
    several = gate.geometry in ("lavida_tiles", "seed_canvas48")
    matched = gate.budget == "matched"
    cases = {
        "crop_term=centre: only geometry=seed_canvas48 has a centre crop; choose none, border or literal": (
            gate.crop_term == "centre" and not overlaps
        ),
        f"crop_term=literal numbers views, and geometry={gate.geometry} has one on its canvas; choose none or border": (
            gate.crop_term == "literal" and not several
        ),
        f"crop_term={gate.crop_term} counts nothing while weights.crop is 0": (
            gate.crop_term != "none" and weights.crop == 0
        ),
        "all weights in use are 0: there is nothing to rank by; raise one of weights.*": (
            not any((weights.similarity, weights.neighbor, weights.centre, weights.variance, weights.edge))
            and gate.crop_term == "none"
        ),
        "variance_of means nothing while weights.variance is 0": (
            gate.variance_of != "channels" and weights.variance == 0
        ),
        "edge_space means nothing while weights.edge is 0": gate.edge_space != "features" and weights.edge == 0,
        "norm_scope means nothing with norm=none; leave it at image": (
            gate.norm == "none" and gate.norm_scope != "image"
        ),
        f"norm_scope=view: geometry={gate.geometry} has no tiles with statistics of their own; choose image": (
            gate.norm_scope == "view" and gate.geometry != "lavida_tiles"
        ),
        f"views=all: geometry={gate.geometry} has no global view beside the canvas; choose tiles": (
            gate.views == "all" and not has_global
        ),
        "underflow=raise is what views=all does anyway where there are too few tokens; choose global or mask": (
            gate.underflow == "raise" and gate.views == "all"
        ),
        f"mask_padding=False: geometry={gate.geometry} fills its view and has no padding; leave it at true": (
            not gate.mask_padding and gate.geometry in SINGLE
        ),
        f"underflow={gate.underflow}: geometry={gate.geometry} has no padding, never too few; leave it at global": (
            gate.underflow != "global" and gate.geometry in SINGLE
        ),
        f"dedup={gate.dedup}: only the crops of geometry=seed_canvas48 share cells; choose relevance": (
            gate.dedup != "relevance" and not overlaps
        ),
        "dedup=mean leaves no doubles to fill up with; choose underflow=mask": (
            gate.dedup == "mean" and gate.underflow != "mask"
        ),
        "dedup=mean and merge.mode=tome both make means; choose one of them": (
            gate.dedup == "mean" and gate.merge.mode != "none"
        ),
        "diversity.mode=mmr cannot promise coverage; choose coverage=0 or diversity.mode=none": (
            gate.diversity.mode != "none" and gate.coverage > 0
        ),
        f"scaffold.source=global: geometry={gate.geometry} has no global view; choose scaffold.source=canvas": (
            gate.scaffold.size != 0 and gate.scaffold.source == "global" and not has_global
        ),
        "underflow=raise needs a budget in numbers; with budget=matched choose global or mask": (
            gate.underflow == "raise" and matched
        ),
        "underflow=raise cannot count the cells of overlapping crops beforehand; choose global or mask": (
            gate.underflow == "raise" and overlaps
        ),
    }
    for sentence, holds in cases.items():
        if holds:
            raise UserError(sentence)
