"""Counts of tokens: where they are in a picture, how many a selector kept, and whether that is its budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from experiments.data.sample import Box
from experiments.metrics import entity_recall
from experiments.metrics.concentration import gini
from shirg import (
    BudgetShare,
    Geometry,
    Role,
    Selection,
    Selector,
    Source,
    TokenLayout,
    VisionFeatures,
    layout_tables,
    regions,
)

if TYPE_CHECKING:
    from lavida_adapter import LavidaConfig

REGION = 4
"""Cells a side of the regions whose coverage is measured: the notes' blocks (docs/method.md, "Coverage")."""
CACHED_SIZES = 128
"""At true size the places of one picture size take 150 KiB, and a dataset may have thousands of sizes."""
FIELDS = 8
"""The picture is divided into 8 x 8 equal fields, in which selections of different pictures are added up."""


@dataclass(frozen=True)
class TokenPlaces:
    """The source tokens of a picture.

    Shape letters: N tokens, P grid cells (several tokens share one where views overlap), R regions, F fields.
    """

    layout: TokenLayout
    box_N4: Tensor
    """Fractions of the picture."""
    valid_N: Tensor
    """bool: not padding."""
    eligible_N: Tensor
    """bool: tile and crop tokens that are not padding. Where there are none, in a single view or in a picture so narrow
    that it covers no tile token's centre, all tokens that are not padding."""

    @cached_property
    def cell_N(self) -> Tensor:
        """int64: the grid cell of each token."""
        return layout_tables(self.layout).grid_cell_N

    @cached_property
    def region_P(self) -> Tensor:
        """int64: the region of each grid cell; -1 where no token of the cell is eligible."""
        first = self.layout.finest[0].start
        region_RL, n_cells = regions(self.layout, REGION, first), int(self.cell_N.max()) + 1
        number_RL = torch.arange(len(region_RL))[:, None].expand_as(region_RL)
        region_P = torch.full((n_cells + 1,), -1).scatter(0, region_RL.flatten(), number_RL.flatten())[:-1]
        return region_P.masked_fill(~self._eligible_P(n_cells), -1)

    @cached_property
    def field_P(self) -> Tensor:
        """int64: the field of the picture in which the centre of each grid cell lies; -1 as in `region_P`."""
        centre_N2 = (self.box_N4[:, :2] + self.box_N4[:, 2:]) / 2
        column_N, row_N = (centre_N2 * FIELDS).floor().long().clamp(0, FIELDS - 1).unbind(-1)
        field_P = torch.full_like(self.region_P, -1).scatter(0, self.cell_N, row_N * FIELDS + column_N)
        return field_P.masked_fill(self.region_P < 0, -1)

    def _eligible_P(self, n_cells: int) -> Tensor:
        return torch.zeros(n_cells, dtype=torch.bool).index_fill(0, self.cell_N[self.eligible_N], True)

    @property
    def fine_area(self) -> float:
        """Share of the picture that its finest token sees."""
        size_N2 = self.box_N4[self.eligible_N, 2:] - self.box_N4[self.eligible_N, :2]
        return float(size_N2.prod(-1).min())


class TokenGeometry:
    """Where a model puts its tokens, by picture size; the latest sizes are cached, because datasets repeat them."""

    def __init__(self, config: "LavidaConfig", geometry: Geometry = "lavida_tiles") -> None:
        self.config, self.geometry = config, geometry
        self._placed = lru_cache(CACHED_SIZES)(self._place)

    def __call__(self, size: tuple[int, int]) -> TokenPlaces:
        return self._placed(size)

    def matched(self, size: tuple[int, int]) -> int:
        """The number of tokens that the base model itself would use for a picture of this size."""
        from lavida_adapter.views import pooled_count

        return pooled_count(size, self.config)

    def count_of(self, budget: int | BudgetShare) -> int:
        """The number of tokens of a budget that is the same for every picture."""
        return budget if isinstance(budget, int) else budget.of(self.config.budgets[budget.name])

    def _place(self, size: tuple[int, int]) -> TokenPlaces:
        from lavida_adapter.views import cut

        views = cut(Image.new("RGB", size), self.config, self.geometry)
        features = VisionFeatures(
            tokens_BND=torch.empty(1, views.layout.n_tokens, 0),
            layout=views.layout,
            valid_BN=views.valid_N[None],
            picture_B4=torch.tensor([views.picture_4]),
            size_B2=torch.tensor([size]),
            ids=("",),
            n_valid=(int(views.valid_N.sum()),),
        )
        detail_N = views.valid_N & (views.layout.role_N != Role.GLOBAL)
        eligible_N = detail_N if bool(detail_N.any()) else views.valid_N
        return TokenPlaces(views.layout, features.box_BN4()[0], views.valid_N, eligible_N)


def count_sources(selection: Selection) -> dict[str, int]:
    """Tokens of one picture by where they come from."""
    used_T = selection.source_BT[0][selection.mask_BT[0]]
    counts = torch.bincount(used_T, minlength=len(Source)).tolist()
    return {source.name.lower(): counts[source] for source in Source}


def recall(boxes: Sequence[Box], kept_T: Tensor, geometry: TokenGeometry, size: tuple[int, int]) -> float | None:
    """Share of the evidence's tokens that were kept; None without boxes, and where no source token is kept at all."""
    if not boxes or not len(kept_T):
        return None
    placed = geometry(size)
    return entity_recall(boxes=boxes, token_box_N4=placed.box_N4, eligible_N=placed.eligible_N, kept_T=kept_T.cpu())


@dataclass(frozen=True)
class KeptSpread:
    """How the kept source tokens of one picture are spread (docs/report.md, "Statistics of what is kept")."""

    coverage: float | None = None
    """Share of the regions that hold a kept token."""
    gini: float | None = None
    """Gini coefficient of the share that is kept of each region: 0 where it is the same in all of them."""
    kept_map: list[float | None] | None = None
    """Share that is kept of each field, row by row; None for a field without a token."""


def spread_of(kept_T: Tensor, placed: TokenPlaces) -> KeptSpread:
    """The spread of the source tokens `kept_T`; empty where there are none, or no region to spread over.

    As in recall, tokens of the finest views count, and padding does not. Tokens on the same cell count once.
    """
    if not len(kept_T) or not bool((placed.region_P >= 0).any()):
        return KeptSpread()
    kept_P = torch.zeros_like(placed.region_P, dtype=torch.bool).index_fill(0, placed.cell_N[kept_T.cpu()], True)
    every_P, n_regions = torch.ones_like(kept_P), int(placed.region_P.max()) + 1
    all_R, kept_R = (_counted(placed.region_P, cells_P, n_regions) for cells_P in (every_P, kept_P))
    all_F, kept_F = (_counted(placed.field_P, cells_P, FIELDS**2) for cells_P in (every_P, kept_P))
    share_R = (kept_R.double() / all_R)[all_R > 0]
    shares = zip((kept_F.double() / all_F).tolist(), all_F.tolist(), strict=True)
    return KeptSpread(
        coverage=float((share_R > 0).double().mean()),
        gini=gini(share_R.numpy(), all_R[all_R > 0].numpy()),
        kept_map=[share if n else None for share, n in shares],
    )


def _counted(number_P: Tensor, cells_P: Tensor, n: int) -> Tensor:
    """How many of the cells have each number from 0 to n - 1; cells with the number -1 do not count."""
    return torch.bincount(number_P[cells_P & (number_P >= 0)], minlength=n)


def check_counts(
    selector: Selector,
    sources: Mapping[str, int],
    n_visual: int,
    geometry: TokenGeometry,
    size: tuple[int, int],
    sample: str,
) -> None:
    """Raises RuntimeError when the model got another number of tokens than the selector's configuration says."""
    total = sum(sources.values())
    without_newlines = total - sources[Source.NEWLINE.name.lower()]
    if n_visual != total:
        raise RuntimeError(f"{sample}: the selector gave {total} tokens, the prefix has {n_visual}")
    budget = selector.budget
    if budget is None:
        return
    valid_N, layout = geometry(size).valid_N, geometry(size).layout
    if budget == "matched":
        expected, counted = geometry.matched(size), total
        # A base model that does not pool feeds every token and newlines besides: there are not as many to choose from.
        least = min(expected, int(valid_N.sum()))
    else:
        expected, counted = geometry.count_of(budget), without_newlines
        least = expected
    exact = not selector.may_use_less_on(layout, padding=not bool(valid_N.all()))
    if counted > expected or (counted < least and exact):
        raise RuntimeError(f"{sample}: kept {counted} tokens, expected {expected} (budget={budget})")
