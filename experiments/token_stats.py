"""Counts of tokens: where they are in a picture, how many a selector kept, and whether that is its budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from experiments.data.sample import Box
from experiments.metrics import entity_recall
from shirg import BudgetShare, Geometry, Role, Selection, Selector, Source, TokenLayout, VisionFeatures

if TYPE_CHECKING:
    from lavida_adapter import LavidaConfig


@dataclass(frozen=True)
class TokenPlaces:
    """The source tokens of a picture."""

    layout: TokenLayout
    box_N4: Tensor
    """Fractions of the picture."""
    eligible_N: Tensor
    """bool: tile and crop tokens that are not padding; all tokens of a picture that has no tiles."""

    @property
    def fine_area(self) -> float:
        """Share of the picture that its finest token sees."""
        size_N2 = self.box_N4[self.eligible_N, 2:] - self.box_N4[self.eligible_N, :2]
        return float(size_N2.prod(-1).min())


class TokenGeometry:
    """Where a model puts its tokens, by picture size; cached, because datasets repeat sizes."""

    def __init__(self, config: "LavidaConfig", geometry: Geometry = "lavida_tiles") -> None:
        self.config, self.geometry = config, geometry
        self._placed: dict[tuple[int, int], TokenPlaces] = {}

    def __call__(self, size: tuple[int, int]) -> TokenPlaces:
        if size not in self._placed:
            self._placed[size] = self._place(size)
        return self._placed[size]

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
        detail_N = views.layout.role_N != Role.GLOBAL
        detail_N = detail_N if bool(detail_N.any()) else torch.ones_like(detail_N)
        return TokenPlaces(views.layout, features.box_BN4()[0], views.valid_N & detail_N)


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
    if budget == "matched":
        expected, counted = geometry.matched(size), total
    else:
        expected, counted = geometry.count_of(budget), without_newlines
    if counted > expected or (counted < expected and not selector.may_use_less):
        raise RuntimeError(f"{sample}: kept {counted} tokens, expected {expected} (budget={budget})")
