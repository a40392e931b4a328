"""Budgets by content: what a head expects, what it chooses, and what it learns from."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shirg import ShirgSelector
from shirg.adaptive import TEMPERATURES, AdaptiveHead, effective_number
from shirg.options import Adaptive
from tests.features import make_features

KNOBS = Adaptive(mode="head", levels=(0.5, 0.75, 1.0), tolerance=0.1)
SCORES = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, -1.0, 9.0]])
USABLE = torch.tensor([[True] * 4, [True, True, True, False]])


def trained(weight: list[list[float]], bias: list[float], knobs: Adaptive = KNOBS) -> AdaptiveHead:
    head = AdaptiveHead(knobs)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor(weight))
        head.linear.bias.copy_(torch.tensor(bias))
    return head


def by_hand(scores: list[float], temperature: float) -> float:
    weights = [math.exp(s / temperature) for s in scores]
    shares = [w / sum(weights) for w in weights]
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_effective_number_of_tokens(temperature: float) -> None:
    found = effective_number(SCORES, USABLE, temperature)
    assert found.tolist() == pytest.approx([4.0, by_hand([3.0, 0.0, -1.0], temperature)], abs=1e-5)


def test_what_a_head_expects_is_linear_in_the_shares() -> None:
    weight = [[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]]
    head = trained(weight, [0.1, 0.2, 0.3])
    shares = [[1.0] * 4, [by_hand([3.0, 0.0, -1.0], t) / 3 for t in TEMPERATURES]]
    for level, (row, bias) in enumerate(zip(weight, [0.1, 0.2, 0.3], strict=True)):
        levels, expected = head(SCORES, USABLE, level)
        assert levels.tolist() == [level, level]
        wanted = [bias + sum(w * s for w, s in zip(row, share, strict=True)) for share in shares]
        assert expected.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("bias", "level"), [([0.5, 0.2, 0.0], 2), ([0.5, 0.1, 0.0], 1), ([0.1, 0.5, 0.0], 0), ([0.2, 0.3, 1.0], 0)]
)
def test_the_smallest_level_that_is_good_enough(bias: list[float], level: int) -> None:
    head = trained([[0.0] * 4] * 3, bias)
    levels, expected = head(SCORES, USABLE)
    assert levels.tolist() == [level] * 2
    assert expected.tolist() == pytest.approx([bias[level]] * 2)


def test_an_untrained_head_keeps_everything() -> None:
    features = make_features((2, 2), sizes=[(640, 480), (480, 640)])
    gate = ShirgSelector(budget=69, adaptive={"mode": "head"}, scaffold={"size": 3})
    assert gate(features).mask_BT.sum(-1).tolist() == [69, 69]
    assert gate.may_use_less


def test_levels_are_fixed_for_training_and_share_the_head() -> None:
    features = make_features((2, 2), sizes=[(640, 480), (480, 640)])
    gate = ShirgSelector(budget=69, adaptive={"mode": "head"}, scaffold={"size": 3})
    fixed = [gate.at_level(i) for i in range(3)]
    assert [f(features).mask_BT.sum(-1).tolist() for f in fixed] == [[9 + k] * 2 for k in (30, 45, 60)]
    assert gate.level is None and all(f.head is gate.head for f in fixed)
    expected: Tensor = fixed[0](features).expected_B
    expected.sum().backward()
    assert gate.head is not None
    gradient = gate.head.linear.weight.grad
    assert gradient is not None and gradient[0].abs().min() > 0 and gradient[1:].abs().max() == 0
    plain = ShirgSelector(budget=69, scaffold={"size": 3})(features)
    assert plain.expected_B is None and torch.equal(plain.tokens_BTD, gate(features).tokens_BTD)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"mode": "head", "temperature": 0.1}, "adaptive.temperature means nothing with adaptive.mode=head"),
        ({"mode": "entropy", "tolerance": 1.0}, "adaptive.tolerance means nothing with adaptive.mode=entropy"),
        ({"mode": "head", "tolerance": -1.0}, "adaptive.tolerance=-1.0: give a number >= 0"),
        ({"mode": "entropy", "levels": [0.5]}, "rising shares of the budget that end with 1"),
        ({"mode": "entropy", "temperature": 0.0}, "adaptive.temperature=0.0: give a number above 0"),
        ({"levels": [0.1, 1.0]}, "adaptive.levels means nothing with adaptive.mode=none"),
        ({"mode": "learned"}, "adaptive.mode='learned': choose one of none, entropy, head"),
    ],
)
def test_knobs_that_mean_nothing(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Adaptive(**knobs)


def test_the_tolerance_decides_how_early_to_stop() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    for tolerance, kept in ((0.0, 69), (0.3, 54), (0.6, 39)):
        gate = ShirgSelector(budget=69, adaptive={"mode": "head", "tolerance": tolerance}, scaffold={"size": 3})
        assert gate(features).mask_BT.sum().item() == kept
