"""Budgets, shares of a number, and what the base model would use (docs/lavida.md, "Pooling")."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, Self, TypeVar, overload

import torch
from torch import Tensor

from shirg.features import PictureCounts, TokenLayout, VisionFeatures
from shirg.layouts import black_fields, layout_tables
from shirg.validation import UserError

Count = TypeVar("Count", int, Tensor)
"""A number of tokens, or an int64 tensor of such numbers."""


@dataclass(frozen=True)
class Share:
    """A share of a number of tokens, as the fraction that its digits stand for: 0.07 is 7/100.

    As floats, 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996, so the one rounded up and the other
    rounded down miss by a token. Here all products are whole numbers, of ints and of tensors alike.
    """

    numerator: int
    denominator: int

    @classmethod
    def of(cls, share: float) -> Self:
        # A float is closer to the fraction that is meant than any other with so small a denominator.
        meant = Fraction(share).limit_denominator(10**9)
        return cls(meant.numerator, meant.denominator)

    def down(self, n: Count) -> Count:
        return self.numerator * n // self.denominator

    def up(self, n: Count) -> Count:
        return -(-self.numerator * n // self.denominator)

    def nearest(self, n: Count) -> Count:
        """Halves are rounded up."""
        return (2 * self.numerator * n + self.denominator) // (2 * self.denominator)


def check_part(name: str, part: float) -> None:
    """Refuses what is neither a number of tokens nor, as a float, a share of them.

    Raises:
        UserError: names the option.
    """
    is_count = isinstance(part, int) and not isinstance(part, bool) and part >= 1
    if not is_count and not (isinstance(part, float) and 0 < part < 1):
        raise UserError(f"{name}={part}: give a number of tokens, or a share between 0 and 1")


@dataclass(frozen=True)
class BudgetShare:
    """A share of a budget that has a name; "base" is what the base model nominally uses."""

    share: Fraction
    name: str

    def of(self, count: int) -> int:
        """That share of `count` tokens, rounded, at least 1."""
        return max(1, round(self.share * count))

    def __str__(self) -> str:
        return self.name if self.share == 1 else f"{self.share} {self.name}"

    def __repr__(self) -> str:
        return repr(str(self))


Budget = int | Literal["matched", "base"] | BudgetShare
"""Tokens per picture; "matched": as many as the base model uses for it. "base": as many as it nominally uses, and a
text such as "3/4 base" is that share of it (`parse_budget`)."""
ParsedBudget = int | Literal["matched"] | BudgetShare
"""A budget that was parsed."""


def parse_budget(budget: object) -> ParsedBudget:
    """A number, "matched", a name such as "base", or a share of a name such as "3/4 base".

    Raises:
        UserError: it is none of these.
    """
    if isinstance(budget, BudgetShare) or (isinstance(budget, int) and not isinstance(budget, bool) and budget > 0):
        return budget
    if budget == "matched":
        return "matched"
    found = re.fullmatch(r"(?:([1-9]\d*)/([1-9]\d*) )?([a-z]\w*)", budget) if isinstance(budget, str) else None
    if found is None:
        raise UserError(f"budget={budget!r}: give a positive number of tokens, 'matched', 'base' or '3/4 base'")
    top, bottom, name = found.groups(default="1")
    return BudgetShare(Fraction(int(top), int(bottom)), name)


@overload
def count_on(budget: int | BudgetShare, layout: TokenLayout) -> int: ...
@overload
def count_on(budget: ParsedBudget, layout: TokenLayout) -> int | Literal["matched"]: ...
def count_on(budget: ParsedBudget, layout: TokenLayout) -> int | Literal["matched"]:
    """The number of tokens of a budget on this layout; "matched" depends on the picture and stays as it is.

    Raises:
        UserError: a share of the base model's budget, which the layout does not know.
    """
    if not isinstance(budget, BudgetShare):
        return budget
    if layout.base_budget is None:
        raise UserError(
            f"budget='{budget}' is relative to the base model's number of tokens, which these features do not say: "
            "pass base= to features_from, or give the budget as a number"
        )
    return budget.of(layout.base_budget)


def matched_count_B(features: VisionFeatures) -> Tensor:
    """How many tokens [B] the base model itself would use for each picture, whatever the geometry is."""
    layout = features.layout
    if layout.geometry == "lavida_tiles":
        return pooled_count_B(layout, features.size_B2)
    if features.base_count_B is None:
        raise UserError(
            f"budget='matched' on geometry={layout.geometry} needs VisionFeatures.base_count_B, the base model's count"
        )
    return features.base_count_B


def least_pooled(layout: TokenLayout) -> int:
    """The smallest `matched_count_B` of any picture."""
    pooling = layout.known_pooling
    if pooling.most is not None:
        return pooling.least
    area = pooling.side**2
    if pooling.merge == "flat":
        return layout.n_views * area
    return area + (layout.canvas == (0, 0))


def most_pooled(layout: TokenLayout) -> int:
    """The largest `matched_count_B` of this layout; without pooling its newlines can make it more than the tokens."""
    pooling = layout.known_pooling
    if pooling.most is not None:
        return pooling.most
    flat = layout.n_views * pooling.side**2
    if pooling.merge == "flat":
        return flat
    rows = 1 if layout.canvas == (0, 0) else layout.canvas[0] // layout.side * pooling.side
    return flat + rows


def pooled_count_B(layout: TokenLayout, size_B2: Tensor) -> Tensor:
    """How many tokens [B] the base model itself would use for each picture, newlines included.

    Float64 and the order of operations matter for borderline pictures (docs/lavida.md, "Unpadding").
    """
    area = layout.known_pooling.side**2
    if layout.known_pooling.merge == "flat":
        return torch.full_like(size_B2[:, 0], layout.n_views * area)
    if layout.canvas == (0, 0):
        return torch.full_like(size_B2[:, 0], layout.n_views * area + 1)
    top, bottom, left, right = unpad_bounds(layout, size_B2)
    rows, cols = (bottom - top).clamp_min(0), (right - left).clamp_min(0)
    return torch.where(cols > 0, area + rows * (cols + 1), torch.full_like(rows, area))


def picture_counts(layout: TokenLayout, valid_BN: Tensor, base: Sequence[int] | None) -> tuple[PictureCounts, ...]:
    """What selectors ask of each picture on the host; waits for the device of `valid_BN`, which must be the layout's.

    `base`: how many tokens the base model would use for each picture, where that is known.
    """
    tables, (part, (rows, cols)) = layout_tables(layout), layout.finest
    count_BP = torch.zeros(len(valid_BN), len(tables.even_P), dtype=torch.int64, device=valid_BN.device)
    count_BP = count_BP.index_add(1, tables.grid_cell_N, valid_BN.long())
    count_BRC = torch.unflatten(count_BP[:, part], 1, (rows, cols))
    valid_BRC = count_BRC > 0
    near_BRC = torch.zeros_like(valid_BRC)
    near_BRC[:, 1:] |= valid_BRC[:, :-1]
    near_BRC[:, :-1] |= valid_BRC[:, 1:]
    near_BRC[:, :, 1:] |= valid_BRC[:, :, :-1]
    near_BRC[:, :, :-1] |= valid_BRC[:, :, 1:]
    stays_RC = black_fields(rows, cols, valid_BN.device)
    used_B = valid_BRC.any(-1).sum(-1) if layout.canvas != (0, 0) else torch.ones_like(count_BP[:, 0])
    joinable_B = (valid_BRC & near_BRC & ~stays_RC).sum((1, 2))
    doubled_B = ((count_BRC - 1).clamp_min(0) * stays_RC).sum((1, 2))
    known = torch.stack([used_B, joinable_B, doubled_B], dim=-1).tolist()
    bases: Sequence[int | None] = [None] * len(known) if base is None else base
    return tuple(PictureCounts(n, *of_one) for n, of_one in zip(bases, known, strict=True))


def counts_of(features: VisionFeatures, *, padded: bool = True) -> tuple[PictureCounts, ...]:
    """The counts of each picture; without `padded` those that it would have if all of its tokens were valid.

    Where they are not known, nor what the base model would use, those of the worst picture of the layout.
    """
    layout, known = features.layout, features.counts
    if padded and known is not None:
        return known
    rows, cols = layout.finest[1]
    worst = PictureCounts(
        base=None,
        rows=max(layout.canvas[0], 1),
        joinable=(rows * cols + 1) // 2 * (rows * cols > 1),
        doubled=layout.n_tokens - rows * cols - layout.n_global * (layout.canvas != (0, 0)),
    )
    return tuple(replace(worst, base=one.base) for one in known) if known else (worst,) * len(features.ids)


def unpad_bounds(layout: TokenLayout, size_B2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last+1 kept row and column [B] of the pooled mosaic: top, bottom, left, right."""
    side = layout.known_pooling.side
    rows, cols = layout.canvas[0] // layout.side * side, layout.canvas[1] // layout.side * side
    w, h = size_B2[:, 0].double(), size_B2[:, 1].double()
    wide = w / h > cols / rows
    new_h = torch.trunc(h * (cols / w)).to(torch.int64)
    new_w = torch.trunc(w * (rows / h)).to(torch.int64)
    pad_y = torch.where(wide, (rows - new_h) // 2, torch.zeros_like(new_h))
    pad_x = torch.where(wide, torch.zeros_like(new_w), (cols - new_w) // 2)
    return pad_y, rows - pad_y, pad_x, cols - pad_x
