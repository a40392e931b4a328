"""Budgets: what a number, a name and a share mean."""

from fractions import Fraction
from typing import Any

import pytest

from shirg import BudgetShare, Pooling, Selector, UserError, parse_budget, tiles_layout
from shirg.budget import count_on


@pytest.mark.parametrize(
    ("budget", "parsed"),
    [
        (7, 7),
        ("matched", "matched"),
        ("base", BudgetShare(Fraction(1), "base")),
        ("768/980 base", BudgetShare(Fraction(768, 980), "base")),
        ("3/2 wide", BudgetShare(Fraction(3, 2), "wide")),
        (BudgetShare(Fraction(1, 2), "base"), BudgetShare(Fraction(1, 2), "base")),
    ],
)
def test_budgets_are_parsed(budget: Any, parsed: Any) -> None:
    assert parse_budget(budget) == parsed


@pytest.mark.parametrize(
    "budget", [0, -1, True, 1.5, None, "7", "", "0/2 base", "1/0 base", "1/2", "1/2  base", "Base"]
)
def test_other_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(UserError, match="give a positive number of tokens, 'matched', 'base' or '3/4 base'"):
        parse_budget(budget)


def test_a_share_is_rounded_and_never_nothing() -> None:
    assert [BudgetShare(Fraction(n, 980), "base").of(80) for n in (768, 1, 980)] == [63, 1, 80]


def test_a_selector_and_a_layout_know_the_base_budget() -> None:
    layout = tiles_layout(1, 2, side=3, patch_px=1, view_px=3, pooling=Pooling(side=2))
    selector = Selector(budget="3/4 base")  # type: ignore[arg-type]
    assert repr(selector) == "Selector(budget='3/4 base')" and isinstance(selector.budget, BudgetShare)
    with pytest.raises(UserError, match="budget='3/4 base' is relative to the base model's number of tokens"):
        count_on(selector.budget, layout)
    assert count_on(9, layout) == 9 and count_on("matched", layout) == "matched"
