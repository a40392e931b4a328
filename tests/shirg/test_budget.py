"""Shares of a number are exact, as a function and in every option that is one."""

import math
from fractions import Fraction

import pytest
import torch

from baselines import Saint, ToMe, TopV, VisionZip, VisPruner
from baselines.base import count_per_round
from lavida_adapter import AdaptiveK
from lavida_adapter.cache_compression.compressor import FirstStep
from shirg import Pooling, Share, VisionFeatures
from shirg.layouts import single_layout
from shirg.options import Adaptive, Merging
from shirg.trainable import adaptive_budget
from tests.features import make_features
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
    first = FirstStep(torch.zeros(1, 1, 100), torch.ones(1, 1, dtype=torch.bool), torch.eye(10)[None, :1] * 100)
    counts_B = AdaptiveK(budget=100, levels=levels, candidates=(2.0,)).kept_counts(made_prefix(), first, (100,))
    assert counts_B is not None and counts_B.tolist() == [percent]
