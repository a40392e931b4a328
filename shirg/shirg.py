"""SHIRG: score the tokens and keep the best, beside a coarse picture and an optional summary of the rest.

docs/method.md, "Terms", defines every term; its section "Variants" says which options make which of the notes' methods.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from shirg.budget import Budget, count_on, counts_of, least_pooled
from shirg.dedup import CellAssignment, assign_cells, average_cells
from shirg.features import Geometry, TokenLayout, VisionFeatures
from shirg.layouts import layout_tables, regions
from shirg.merging import cell_means, match_neighbours
from shirg.options import (
    SINGLE_GEOMETRIES,
    Adaptive,
    Allocation,
    CoordKind,
    CropTerm,
    Dedup,
    Diversity,
    EdgeSpace,
    Merging,
    Neighbour,
    Newline,
    Norm,
    NormScope,
    Scaffold,
    ShirgOptions,
    Underflow,
    VarianceOf,
    Views,
    Weights,
)
from shirg.scaffold import close_rows, scaffold_tokens, summary_token, used_rows
from shirg.scoring import ScoreTerms
from shirg.selection import Selection, Selector, join, keep
from shirg.topk import boost_representatives, evidence_first, marginal_relevance, tiered_topk
from shirg.trainable import AdaptiveHead, CoordEmbed, adaptive_budget
from shirg.validation import UserError, assert_finite, option_group


class ShirgSelector(Selector):
    """The SHIRG family; the defaults are SHIRG-980 with its published formula on LaViDa's own tiles.

    score = similarity z(relevance) + sign neighbour z(distance to the 8-neighbours) - crop c - centre z(distance from
    the centre) + variance z(variance) + edge z(edges), each with its weight.

    The best K = budget - scaffold - summary tokens are kept, in reading order, after the scaffold tokens and before the
    summary. Scores are float32 and carry no gradient; tokens, scaffold and summary do.

    Args:
        budget: tokens per picture, everything included; "matched": as many as the base model would use for it.
        geometry: how the picture is cut into views.
        views: "tiles": tokens of the global view are kept only where there are too few tile tokens; "all": they
            compete with the tiles.
        weights: `similarity`, `neighbour`, `crop`, `centre`, `variance` and `edge`, each >= 0.
        neighbour: `metric` and `sign`; -1 is the published sign, +1 prefers tokens unlike their surroundings.
        variance_of: over the token's "channels", or over its "neighbourhood".
        edge_space: edges of "features" between tokens, or of "pixels" inside a patch (needs the tap "pixels").
        norm: how the terms are made comparable; "none" is the formula as printed.
        norm_scope: "image" takes statistics over all tiles of a picture, "view" over each tile.
        mask_padding: letterbox padding can neither be kept nor counted. False is the literal reading of the notes.
        crop_term: "none", "border", "centre" or "literal".
        dedup: which of the tokens of overlapping crops a cell is assigned to: the most relevant, the one deepest inside
            its crop ("border"), or their "mean".
        coverage: side in cells of the regions that each keep their best token; 0 for none.
        merge: `mode` "tome" merges the most similar neighbours, a `share` of the cells, before selection.
        allocation: `mode` "evidence_context" takes `evidence` tokens (a number, or a share of K) by score, of these
            with `mass` only the fewest that hold this share of the softmax of all scores; the rest lie evenly.
        diversity: `mode` "mmr" picks one by one, by score minus `weight` x the largest cosine to those before; slow.
        adaptive: a budget that depends on the picture, one of `levels` (shares of its K). `mode` "entropy": the
            smallest that holds the relevant tokens; "head": the smallest that a trained head predicts to be as good as
            all K.
        scaffold: `size`, `source` and `space`; "post" pools projected tokens and turns this into a selector of stage
            "post", which needs the tap "encoder" to score by.
        summary: a last token, the mean of all that were not kept.
        newline: "row" adds a NEWLINE slot to each canvas row that is not padding. They come on top of a budget in
            numbers and inside a matched one, which counts the base model's newlines too.
        underflow: where a picture has too few tokens: "global" fills up from the global view, then with the duplicates
            of overlapping crops, by score; "mask" leaves slots unused, "raise" refuses.
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
        neighbour: Mapping[str, Any] | None = None,
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
        allocation: Mapping[str, Any] | None = None,
        adaptive: Mapping[str, Any] | None = None,
        scaffold: Mapping[str, Any] | None = None,
        summary: bool = False,
        newline: Newline = "none",
        underflow: Underflow = "global",
        coord_embed: CoordKind = "none",
        coord_width: int | None = None,
    ) -> None:
        super().__init__(budget=budget, geometry=geometry)
        self.options = ShirgOptions(
            budget=budget,
            geometry=geometry,
            views=views,
            weights=option_group("weights", weights, Weights),
            neighbour=option_group("neighbour", neighbour, Neighbour),
            variance_of=variance_of,
            edge_space=edge_space,
            norm=norm,
            norm_scope=norm_scope,
            mask_padding=mask_padding,
            crop_term=crop_term,
            dedup=dedup,
            coverage=coverage,
            merge=option_group("merge", merge, Merging),
            diversity=option_group("diversity", diversity, Diversity),
            allocation=option_group("allocation", allocation, Allocation),
            adaptive=option_group("adaptive", adaptive, Adaptive),
            scaffold=option_group("scaffold", scaffold, Scaffold),
            summary=summary,
            newline=newline,
            underflow=underflow,
            coord_embed=coord_embed,
            coord_width=coord_width,
        )
        options = self.options
        self.terms = ScoreTerms(options)
        self.stage = options.scaffold.space
        pixels = {"pixels"} if options.weights.edge and edge_space == "pixels" else set()
        self.needs = frozenset(pixels | ({"encoder"} if self.stage == "post" else set()))
        self.uses_relevance = options.weights.similarity > 0 or (dedup == "relevance" and options.overlaps)
        self.may_use_less = self._leaves_slots or self._loses_windows
        self.coords = None if coord_width is None else CoordEmbed(width=coord_width)
        self.head = AdaptiveHead(options.adaptive) if options.adaptive.mode == "head" else None
        self.level: int | None = None

    def option(self, name: str, default: Any) -> Any:
        return getattr(self.options, name)

    @property
    def _leaves_slots(self) -> bool:
        return self.options.underflow == "mask" or self.options.adaptive.mode != "none"

    @property
    def _loses_windows(self) -> bool:
        """Whether the view of the scaffold can have padding: a window that is padding alone has no token."""
        options, scaffold = self.options, self.options.scaffold
        if options.geometry in SINGLE_GEOMETRIES or (options.geometry == "fovea" and scaffold.source == "global"):
            return False
        return scaffold.size != 0 and options.mask_padding

    def may_use_less_on(self, layout: TokenLayout, *, padding: bool = True) -> bool:
        on_padding = self.options.scaffold.source == "canvas" or layout.canvas == (0, 0)
        return self._leaves_slots or (self._loses_windows and padding and on_padding)

    def at_level(self, level: int) -> Self:
        """This selector with every picture at one of `adaptive.levels`; the parameters are shared. Trains the head."""
        fixed = copy.copy(self)
        fixed.level = level
        return fixed

    def select(self, features: VisionFeatures) -> Selection:
        options, layout = self.options, features.layout
        side = options.scaffold.side(layout)
        usable_BN = features.valid_BN if options.mask_padding else torch.ones_like(features.valid_BN)
        rows_BR = used_rows(layout, usable_BN)
        features = average_cells(features) if options.dedup == "mean" else features
        with torch.no_grad():
            k, keep_B = self.resolve_budget(features)
            if options.newline == "row" and self.budget == "matched":
                keep_B = keep_B - rows_BR.sum(-1)
            assigned = assign_cells(layout, usable_BN, features.relevance_BN, options.dedup)
            ranks_global = self._ranks_global(features, k)
            scores_BP = self.terms.score(features, self._states(features), assigned, ranks_global)
            assert_finite(scores_BP, assigned.usable_BP, type(self).__name__)
            for row_P, ranks in zip(scores_BP, ranks_global, strict=True):
                row_P[: 0 if ranks else layout.n_global] = -torch.inf
            merge, competing, competing_BP, fill_BN = None, assigned, scores_BP, usable_BN
            if options.merge.mode == "tome":
                merge = match_neighbours(layout, self._states(features), assigned, options.merge.count(layout))
                competing, competing_BP = merge.competitors(assigned), merge.best(scores_BP)
                # A duplicate of a merged cell would be the same mean once more.
                fill_BN = usable_BN & ~merge.holds_mean_BN() if assigned.shared else usable_BN
        first = self._first_cell(layout)
        adaptive_B, expected_B = adaptive_budget(
            options.adaptive, self.head, self.level, competing_BP[:, first:], competing.usable_BP[:, first:], keep_B
        )
        with torch.no_grad():
            keep_B = torch.minimum(keep_B, adaptive_B)
            ranked_BK, available_B = self._rank(features, competing, competing_BP, fill_BN, k, keep_B)
            keep_B = torch.minimum(keep_B, available_B)
        scores_BN = scores_BP[:, layout_tables(layout).grid_cell_N]
        means = None if merge is None else merge.means(features, assigned)
        if options.dedup == "mean":
            means = cell_means(features)
        chosen = keep(features if means is None else means.features, ranked_BK, keep_B, scores_BN=scores_BN)
        summary = [summary_token(features, usable_BN, chosen)] if options.summary else []
        if options.newline == "row":
            chosen = close_rows(chosen, features, rows_BR)
        if means is not None:
            chosen = means.mark(chosen)
        parts = [self.embed(chosen)]
        if side:
            parts.insert(0, self.embed(scaffold_tokens(features, assigned, side, options.scaffold.source)))
        return replace(join(*parts, *map(self.embed, summary)), scores_BN=scores_BN, expected_B=expected_B)

    def score(self, features: VisionFeatures) -> Tensor:
        """Scores [B, N] of all tokens, padding included; tokens that share a cell have the score of its token."""
        usable_BN = features.valid_BN if self.options.mask_padding else torch.ones_like(features.valid_BN)
        assigned = assign_cells(features.layout, usable_BN, features.relevance_BN, self.options.dedup)
        everywhere = (True,) * len(features.ids)
        scores_BP = self.terms.score(features, self._states(features), assigned, everywhere)
        return scores_BP[:, layout_tables(features.layout).grid_cell_N]

    def _states(self, features: VisionFeatures) -> Tensor:
        """The encoder states, which are what is scored."""
        return features.taps["encoder"] if self.stage == "post" else features.tokens_BND

    def _first_cell(self, layout: TokenLayout) -> int:
        """The first cell that competes; the tokens of those before it only fill up."""
        return layout.n_global if self.options.views == "tiles" and layout.canvas != (0, 0) else 0

    def _ranks_global(self, features: VisionFeatures, k: int) -> tuple[bool, ...]:
        """Whether each picture's global view must be ranked: it competes, or the picture may have too few tile tokens.

        Known on the host, and for each picture alone, so that no choice depends on the other pictures of a batch.
        """
        layout = features.layout
        if not self._first_cell(layout):
            return (True,) * len(features.ids)
        usable = features.n_valid if self.options.mask_padding else (layout.n_tokens,) * len(features.ids)
        return tuple(n - layout.n_global - self.options.merge.count(layout) < k for n in usable)

    def _rank(
        self,
        features: VisionFeatures,
        assigned: CellAssignment,
        scores_BP: Tensor,
        fill_BN: Tensor,
        k: int,
        keep_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, k], best first, and how many there are to choose from [B].

        `fill_BN`: which tokens may fill up as duplicates of overlapping crops.
        """
        options, layout = self.options, features.layout
        first, fills = self._first_cell(layout), options.underflow == "global"
        token_BX, usable_BX, worth_BX = (
            assigned.token_BP[:, first:],
            assigned.usable_BP[:, first:],
            scores_BP[:, first:],
        )
        if options.coverage:
            region_RL = regions(layout, options.coverage, first)
            if self.budget != "matched" and len(region_RL) > k:
                raise UserError(
                    f"coverage={options.coverage} has {len(region_RL)} regions to cover, but only {k} tokens are kept; "
                    "raise coverage or budget"
                )
            worth_BX = boost_representatives(worth_BX, usable_BX, region_RL - first)
        if options.diversity.mode == "mmr":
            states_BXD = assigned.take(self._states(features))[:, first:]
            picks = min(k, worth_BX.shape[1])
            worth_BX = marginal_relevance(worth_BX, usable_BX, states_BXD, picks, options.diversity.weight)
        if options.allocation.mode == "evidence_context":
            even_X = layout_tables(layout).even_P[first:]
            n_B = options.allocation.count_B(keep_B)
            worth_BX = evidence_first(worth_BX, usable_BX, n_B, options.allocation.mass, even_X)
        groups = [(token_BX, worth_BX, usable_BX)]
        if first and any(self._ranks_global(features, k)):
            groups.append((assigned.token_BP[:, :first], scores_BP[:, :first], assigned.usable_BP[:, :first] & fills))
        if assigned.shared:
            order_BN = layout.order_N.expand_as(fill_BN)
            assigned_BN = torch.zeros_like(fill_BN).scatter(1, assigned.token_BP, True)
            spare_BN = fill_BN & ~assigned_BN & (fills and options.dedup != "mean")
            worth_BN = scores_BP[:, layout_tables(layout).grid_cell_N].gather(1, order_BN)
            groups.append((order_BN, worth_BN, spare_BN.gather(1, order_BN)))
        return tiered_topk(groups, k)

    def resolve_budget(self, features: VisionFeatures) -> tuple[int, Tensor]:
        """The budget without scaffold and summary: the static K and the count [B] that each picture keeps."""
        taken = self._synthesised(features.layout)
        assert self.budget is not None
        count = count_on(self.budget, features.layout)
        if count == "matched":
            self._check_matched(features, taken)
        elif taken > count:
            raise UserError(
                f"scaffold.size={self.options.scaffold.size} takes {taken} tokens, but budget={self.budget} can be as "
                f"small as {count}; lower scaffold.size or raise budget"
            )
        total, count_B = super().resolve_budget(features)
        return total - taken, count_B - taken

    def _check_matched(self, features: VisionFeatures, taken: int) -> None:
        """Raises UserError when a picture's matched budget does not hold the tokens that are made in any case."""
        layout, options = features.layout, self.options
        made = {
            f"scaffold.size={options.scaffold.size}": taken > options.summary,
            "summary=true": options.summary,
            "newline=row": options.newline == "row",
        }
        names = " and ".join(name for name, is_made in made.items() if is_made)
        known = counts_of(features, padded=options.mask_padding)
        for sample, counts in zip(features.ids, known, strict=True):
            least, total = counts.base, taken + counts.rows * made["newline=row"]
            have = min(layout.n_tokens, least_pooled(layout) if least is None else least)
            if total > have:
                raise UserError(
                    f"{names} {'takes' if sum(made.values()) == 1 else 'take'} {total} tokens, but budget=matched "
                    f"{'can be as small as' if least is None else 'is'} {have} for picture {sample!r}; lower "
                    "scaffold.size, leave newlines out, or give the budget as a number"
                )

    def _synthesised(self, layout: TokenLayout) -> int:
        return self.options.scaffold.side(layout) ** 2 + self.options.summary

    def check_count(self, features: VisionFeatures, wanted: int) -> None:
        """Raises UserError when a picture has fewer tokens than the budget without scaffold and summary."""
        options, layout, taken = self.options, features.layout, self._synthesised(features.layout)
        only_tiles = options.underflow == "raise" and self._first_cell(layout) > 0
        padded, fills = options.mask_padding and options.underflow != "mask", options.underflow == "global"
        known = counts_of(features, padded=padded)
        for sample, n, counts in zip(features.ids, features.n_valid, known, strict=True):
            have = n if padded else layout.n_tokens
            have -= (layout.n_global if only_tiles else 0) + options.merge.loss(layout, counts, fills=fills)
            if have < wanted - taken:
                raise UserError(
                    f"{type(self).__name__}: budget {wanted} less {taken} for the scaffold asks for {wanted - taken} "
                    f"tokens, but picture {sample!r} has {have} {'tile ' if only_tiles else ''}tokens to choose from; "
                    f"lower the budget, or choose budget='matched' or underflow={'global' if only_tiles else 'mask'}"
                )

    def embed(self, selection: Selection) -> Selection:
        return selection if self.coords is None else self.coords.added_to(selection)
