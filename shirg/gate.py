"""SHIRG: score the tokens of the tiles, keep the best, put a coarse picture in front.

docs/method.md, "SHIRG-980", defines every term.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shirg.coords import CoordEmbed
from shirg.coverage import scaffold_tokens
from shirg.geometry import tables
from shirg.knobs import CoordKind, Neighbor, Newline, NormScope, Scaffold, Underflow, Weights, group, one_of
from shirg.newline import close_rows, used_rows
from shirg.scoring import CropTerm, Norm, crop_term, neighbour_term, normalise
from shirg.selection import (
    Budget,
    Selection,
    Selector,
    TokenLayout,
    VisionFeatures,
    assert_finite,
    join,
    keep,
    stable_topk,
)


class ShirgGate(Selector):
    """SHIRG-980, whose defaults are the published formula on LaViDa's own tiles.

    score = weights.similarity z(relevance) + sign weights.neighbor z(distance to the 8-neighbours) - weights.crop crop

    The best K = budget - scaffold tile tokens stay, in reading order, behind size x size scaffold tokens. Scores are
    float32 and carry no gradient; kept tokens and scaffold do.

    Args:
        budget: tokens per picture, scaffold included; "matched": as many as the base model would use for that picture.
        weights: `similarity`, `neighbor` and `crop`, each >= 0.
        neighbor: `metric` and `sign`; -1 is the published sign, +1 prefers tokens unlike their surroundings.
        norm: how relevance and distance are made comparable; "none" is the formula as printed.
        norm_scope: "image" takes statistics over all tiles of a picture, "view" over each tile.
        mask_padding: letterbox padding can neither be kept nor counted. False is the literal reading.
        crop_term: "none", "border" or "literal".
        scaffold: `size`, `source` and `space`; "post" pools projected tokens and turns this into a selector of stage
            "post", which needs the tap "encoder" to score by.
        newline: "row" adds a NEWLINE slot to each canvas row that is not padding. They come on top of a budget in
            numbers and inside a matched one, which counts the base model's newlines too.
        underflow: where a picture has fewer tile tokens than K: "global" fills up from the global view by score,
            "mask" leaves slots unused, "raise" refuses.
        coord_embed: "sincos_linear" adds a trained embedding of each token's box; it starts at zero.
        coord_width: width of the tokens that `coord_embed` is added to.
    """

    uses_relevance: ClassVar[bool] = True

    def __init__(
        self,
        *,
        budget: Budget,
        weights: Mapping[str, float] | None = None,
        neighbor: Mapping[str, Any] | None = None,
        norm: Norm = "zscore",
        norm_scope: NormScope = "image",
        mask_padding: bool = True,
        crop_term: CropTerm = "none",
        scaffold: Mapping[str, Any] | None = None,
        newline: Newline = "none",
        underflow: Underflow = "global",
        coord_embed: CoordKind = "none",
        coord_width: int | None = None,
    ) -> None:
        super().__init__(budget=budget)
        self.weights = group("weights", weights, Weights)
        self.neighbor = group("neighbor", neighbor, Neighbor)
        self.scaffold = group("scaffold", scaffold, Scaffold)
        for name, value, allowed in (
            ("norm", norm, Norm),
            ("norm_scope", norm_scope, NormScope),
            ("crop_term", crop_term, CropTerm),
            ("newline", newline, Newline),
            ("underflow", underflow, Underflow),
            ("coord_embed", coord_embed, CoordKind),
        ):
            one_of(name, value, allowed)
        self.norm: Norm = norm
        self.norm_scope: NormScope = norm_scope
        self.mask_padding = mask_padding
        self.crop_term: CropTerm = crop_term
        self.newline: Newline = newline
        self.underflow: Underflow = underflow
        self._refuse_idle_knobs()
        self.stage = self.scaffold.space
        self.needs = frozenset({"encoder"}) if self.stage == "post" else frozenset()
        if (coord_embed == "none") != (coord_width is None):
            raise ValueError(
                "coord_embed=sincos_linear and coord_width (the tokens' width) go together: set both or none"
            )
        self.coords = None if coord_width is None else CoordEmbed(width=coord_width)

    def _refuse_idle_knobs(self) -> None:
        """A knob that would change nothing is a mistake somewhere else."""
        if self.crop_term == "centre":
            raise ValueError("crop_term=centre: tiles have no centre crop; choose none, border or literal")
        if self.crop_term != "none" and self.weights.crop == 0:
            raise ValueError(f"crop_term={self.crop_term} counts nothing while weights.crop is 0")
        if self.weights.similarity == self.weights.neighbor == 0 and self.crop_term == "none":
            raise ValueError("all weights in use are 0: there is nothing to rank by; raise one of weights.*")
        if self.norm == "none" and self.norm_scope != "image":
            raise ValueError("norm_scope means nothing with norm=none; leave it at image")
        if self.underflow == "raise" and self.budget == "matched":
            raise ValueError("underflow=raise needs a budget in numbers; with budget=matched choose global or mask")

    def select(self, features: VisionFeatures) -> Selection:
        layout, side = features.layout, self.scaffold.side(features.layout)
        usable_BN = features.valid_BN if self.mask_padding else torch.ones_like(features.valid_BN)
        rows_BR = used_rows(layout, usable_BN)
        with torch.no_grad():
            k, keep_B = self.resolve_budget(features)
            if self.newline == "row" and self.budget == "matched":
                keep_B = (keep_B - rows_BR.sum(-1)).clamp_min(0)
            scores_BN = self.score(features)
            assert_finite(scores_BN, usable_BN, type(self).__name__)
            ranked_BK, keep_B = self._rank(layout, scores_BN, usable_BN, k, keep_B)
        chosen = self._with_coords(keep(features, ranked_BK, keep_B, scores_BN=scores_BN))
        if self.newline == "row":
            chosen = close_rows(chosen, features, rows_BR)
        if side == 0:
            return chosen
        coarse = scaffold_tokens(features, usable_BN, side, self.scaffold.source)
        return join(self._with_coords(coarse), chosen)

    def score(self, features: VisionFeatures) -> Tensor:
        """Scores [B, N] of all tokens, padding included."""
        layout, weights = features.layout, self.weights
        order_N, table = layout.order_N, tables(layout)
        assert features.relevance_BN is not None
        usable_BN = features.valid_BN[:, order_N] if self.mask_padding else torch.ones_like(features.valid_BN)
        relevance_BN = features.relevance_BN.float()[:, order_N]
        score_BN = weights.similarity * self._normalise(relevance_BN, usable_BN, layout)
        if weights.neighbor:
            states_BND = features.taps["encoder"] if self.stage == "post" else features.tokens_BND
            # One picture at a time: its temporaries stay in cache, and its score cannot depend on its batch-mates.
            distance_BN = torch.stack(
                [
                    self._distances(x.index_select(0, order_N), valid, layout)
                    for x, valid in zip(states_BND, usable_BN, strict=True)
                ]
            )
            distance_BN = self._normalise(distance_BN, usable_BN, layout)
            score_BN = score_BN + self.neighbor.sign * weights.neighbor * distance_BN
        score_BN = score_BN - weights.crop * crop_term(self.crop_term, table.border_N, table.tile_N)
        return score_BN[:, layout.rank_N]

    def _distances(self, states_ND: Tensor, valid_N: Tensor, layout: TokenLayout) -> Tensor:
        """The neighbour term [N] of one picture in reading order: the global view and the canvas are two grids."""
        n = layout.n_global
        grids = [(slice(n), (layout.side, layout.side))]
        if layout.canvas != (0, 0):
            grids.append((slice(n, None), layout.canvas))
        return torch.cat(
            [
                neighbour_term(
                    torch.unflatten(states_ND[part], 0, shape),
                    torch.unflatten(valid_N[part], 0, shape),
                    self.neighbor.metric,
                ).flatten()
                for part, shape in grids
            ]
        )

    def _normalise(self, values_BN: Tensor, valid_BN: Tensor, layout: TokenLayout) -> Tensor:
        """Comparable values in reading order. The global view is another scale and has statistics of its own."""
        n = layout.n_global
        values_BM, valid_BM = values_BN[:, n:], valid_BN[:, n:]
        parts = [normalise(values_BN[:, :n], valid_BN[:, :n], self.norm)]
        if layout.canvas != (0, 0) and self.norm_scope == "image":
            parts.append(normalise(values_BM, valid_BM, self.norm))
        elif layout.canvas != (0, 0):
            table, split = tables(layout), (-1, layout.side**2)
            by_tile = [torch.unflatten(part[:, table.by_tile_M], 1, split) for part in (values_BM, valid_BM)]
            parts.append(normalise(by_tile[0], by_tile[1], self.norm).flatten(1)[:, table.from_tile_M])
        return torch.cat(parts, dim=1)

    def _rank(
        self, layout: TokenLayout, scores_BN: Tensor, usable_BN: Tensor, k: int, keep_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, k], best first, and how many of them each picture keeps."""
        n, order_N = layout.n_global, layout.order_N
        usable_BN = usable_BN[:, order_N]
        ranked_BN = scores_BN[:, order_N].masked_fill(~usable_BN, float("-inf"))
        best_BN = torch.cat(
            [stable_topk(ranked_BN[:, n:], layout.n_tokens - n) + n, stable_topk(ranked_BN[:, :n], n)], dim=1
        )
        # Slot s takes the s-th tile token while there are usable ones, and then goes through the global view.
        tiles_B1 = usable_BN[:, n:].sum(-1, keepdim=True)
        slot_K = torch.arange(k, device=scores_BN.device)
        fill_BK = (layout.n_tokens - n + slot_K - tiles_B1).clamp_max(layout.n_tokens - 1)
        pick_BK = torch.where(slot_K < tiles_B1, slot_K, fill_BK)
        available_B = usable_BN.sum(-1) if self.underflow == "global" else tiles_B1.squeeze(-1)
        return order_N[best_BN.gather(1, pick_BK)], torch.minimum(keep_B, available_B)

    def resolve_budget(self, features: VisionFeatures) -> tuple[int, Tensor]:
        """What the scaffold leaves of the budget: the static K and the count [B] that each picture keeps."""
        taken = self.scaffold.side(features.layout) ** 2
        least = features.layout.pooling.side**2 if self.budget == "matched" else self.budget
        if least is not None and taken > least:
            raise ValueError(
                f"scaffold.size={self.scaffold.size} takes {taken} tokens, but budget={self.budget} can be as small as "
                f"{least}; lower scaffold.size or raise budget"
            )
        total, count_B = super().resolve_budget(features)
        return total - taken, count_B - taken

    def check_count(self, features: VisionFeatures, wanted: int) -> None:
        """Raises when a picture has fewer tokens to choose from than the scaffold leaves of the budget."""
        layout, taken = features.layout, self.scaffold.side(features.layout) ** 2
        only_tiles = self.underflow == "raise"
        for sample, n in zip(features.ids, features.n_valid, strict=True):
            have = n if self.mask_padding and self.underflow != "mask" else layout.n_tokens
            have -= layout.n_global if only_tiles else 0
            if have < wanted - taken:
                raise ValueError(
                    f"{type(self).__name__}: budget {wanted} less {taken} for the scaffold asks for {wanted - taken} "
                    f"tokens, but picture {sample!r} has {have} {'tile ' if only_tiles else ''}tokens to choose from; "
                    f"lower budget=, or choose budget=matched or underflow={'global' if only_tiles else 'mask'}"
                )

    def _with_coords(self, selection: Selection) -> Selection:
        if self.coords is None:
            return selection
        tokens_BTD, width = selection.tokens_BTD, self.coords.linear.out_features
        if tokens_BTD.shape[-1] != width:
            raise ValueError(
                f"coord_width={width}, but the tokens are {tokens_BTD.shape[-1]} wide; set coord_width to that"
            )
        shift_BTD = self.coords(selection.box_BT4) * selection.mask_BT[..., None]
        return replace(selection, tokens_BTD=tokens_BTD + shift_BTD.to(tokens_BTD.dtype))
