"""Shares of a number are exact, as a function and in every option that is one."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from baselines import Saint, ToMe, TopV, VisionZip, VisPruner
from baselines.base import count_per_round
from lavida_adapter import AdaptiveK
from lavida_adapter.cache_compression.compressor import FirstStep
from shirg import PictureCounts, Pooling, Role, Share, VisionFeatures, picture_counts
from shirg.budget import counts_of
from shirg.layouts import single_layout
from shirg.options import Adaptive, Merging
from shirg.trainable import adaptive_budget
from tests.features import geometry_layout, layout_of, make_features
from tests.lavida_adapter.cache_compression.prompts import made_prefix

NUMBERS = torch.arange(1, 4000, 7)


@pytest.mark.parametrize("digits", [2, 3])
def test_every_decimal_of_every_number(digits: int) -> None:
    for i in range(1, 10**digits, 1 if digits == 2 else 13):
        share, meant = Share.of(float(f"{i / 10**digits:.{digits}f}")), Fraction(i, 10**digits)
        exact = [meant * n for n in NUMBERS.tolist()]
        assert (
            share.down(NUMBERS).tolist() == [math.floor(x) for x in exact] == [share.down(n) for n in NUMBERS.tolist()]
        )
        assert share.up(NUMBERS).tolist() == [math.ceil(x) for x in exact] == [share.up(n) for n in NUMBERS.tolist()]
        nearest = [math.floor(x + Fraction(1, 2)) for x in exact]
        assert share.nearest(NUMBERS).tolist() == nearest == [share.nearest(n) for n in NUMBERS.tolist()]


def test_a_count_divided_by_the_number_is_that_count_again() -> None:
    for n in range(1, 800, 3):
        for count in range(n + 1):
            share = Share.of(count / n)
            assert share.down(n) == share.up(n) == share.nearest(n) == count


def test_the_floats_themselves_miss() -> None:
    """What this is for: if floats did not miss, there would be no reason for fractions."""
    assert math.ceil(0.07 * 100) == 8 and Share.of(0.07).up(100) == 7
    assert int(0.29 * 100) == 28 and Share.of(0.29).down(100) == 29


def test_what_a_round_removes() -> None:
    assert count_per_round(0.014, 576) == 8, "as in VisPruner's code"
    assert [count_per_round(0.0625, n) for n in (64, 576, 729)] == [4, 36, 46]
    assert [count_per_round(rho, n) for rho, n in [(0.07, 100), (0.55, 100), (1e-6, 64), (6.5 / 100, 100)]] == [
        7,
        55,
        1,
        7,
    ]


@pytest.mark.parametrize("geometry", ["lavida_tiles", "single view", "seed_canvas48", "fovea"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_known_of_a_picture(geometry: Any, seed: int) -> None:
    """Cells of any mask, counted one by one; and no mask has more than what is assumed where nothing is known."""
    own = {"lavida_tiles": (2, 1), "single view": (0, 0)}
    layout = layout_of(own[geometry], 4) if geometry in own else geometry_layout(geometry, 4)
    (rows, cols), is_single = layout.finest[1], layout.canvas == (0, 0)
    share = torch.tensor([0.1, 0.5, 0.9, 2.0])[:, None]
    drawn = torch.rand(4, rows * cols, generator=torch.Generator().manual_seed(seed)) < share
    on_grid = (layout.role_N != int(Role.GLOBAL)) | is_single
    cell_N = layout.cell_N2 @ torch.tensor([cols, 1])
    valid = drawn[:, cell_N.masked_fill(~on_grid, 0)] | ~on_grid
    (worst,) = counts_of(make_features(layout=layout, sizes=[(640, 480)], side=4), padded=False)
    for sample, known in enumerate(picture_counts(layout, valid, [7, 8, 9, 10])):
        filled = [c for c in range(rows * cols) if drawn[sample, c]]
        at = set(map(lambda c: divmod(c, cols), filled))
        near = {(r, c) for r, c in at if {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & at}
        several = {c: int((cell_N[on_grid & valid[sample]] == c).sum()) for c in filled}
        assert known == PictureCounts(
            base=7 + sample,
            rows=1 if is_single else len({r for r, _ in at}),
            joinable=sum((r + c) % 2 == 0 for r, c in near),
            doubled=sum(n - 1 for c, n in several.items() if sum(divmod(c, cols)) % 2),
        )
        assert known.rows <= worst.rows and known.joinable <= worst.joinable and known.doubled <= worst.doubled
    assert (known.rows, known.joinable) == (worst.rows, worst.joinable), "the last mask is full"
    assert [one.base for one in picture_counts(layout, valid, None)] == [None] * 4


def one_view(side: int) -> VisionFeatures:
    layout = single_layout(side, 14, Pooling(side=5, most=side * side), geometry="lavida_tiles")
    return make_features(layout=layout, sizes=[(90, 90)], width=24)


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 57, 58])
def test_options_that_are_shares_of_a_hundred(percent: int) -> None:
    """Each rounds its own way, so that other shares of the same count, far from a whole number, do the same."""
    small, large = one_view(10), one_view(15)
    share, below, above = percent / 100, (percent - 0.5) / 100, (percent + 0.4) / 100
    same = [
        (large, VisionZip, {"budget": 100}, "contextual", below),
        (large, VisPruner, {"budget": 100}, "important", above),
        (small, VisPruner, {"budget": 40}, "rho", above),
        (small, ToMe, {"budget": 40}, "rho", below),
        (small, Saint, {"budget": 40}, "rho", above),
        (large, TopV, {"budget": 100}, "recover", below),
    ]
    for features, build, options, name, other in same:
        here, there = (build(**options, **{name: value})(features).tokens_BTD for value in (share, other))
        assert torch.equal(here, there), f"{name} of {build.__name__}"
    if percent <= 50:
        assert Merging(mode="tome", share=share).count(small.layout) == percent


@pytest.mark.parametrize("percent", [29, 57, 58])
def test_levels_of_a_budget(percent: int) -> None:
    levels = (percent / 100, 1.0)
    certain_BN = torch.zeros(1, 200)
    certain_BN[0, 3] = 1000
    options, usable_BN = Adaptive(mode="entropy", levels=levels), torch.ones(1, 200, dtype=torch.bool)
    k_B = torch.tensor([100])
    assert adaptive_budget(options, None, None, certain_BN, usable_BN, k_B)[0].tolist() == [percent]
    first = FirstStep(torch.zeros(1, 1, 100), *torch.ones(2, 1, 1, dtype=torch.bool), torch.eye(10)[None, :1] * 100)
    counts_B = AdaptiveK(budget=100, levels=levels, candidates=(2.0,)).kept_counts(made_prefix(), first, (100,))
    assert counts_B is not None and counts_B.tolist() == [percent]
