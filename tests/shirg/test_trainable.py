"""The trained parts: a coordinate embedding that starts at zero, and the head of the adaptive budget."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shirg import ShirgSelector, Source
from shirg.options import Adaptive
from shirg.trainable import TEMPERATURES, AdaptiveHead, CoordEmbed, effective_number, sincos
from tests.features import make_features
from tests.reference import kept

SMALL = {"scaffold": {"size": 3}}
OPTIONS = Adaptive(mode="head", levels=(0.5, 0.75, 1.0), tolerance=0.1)
SCORES = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, -1.0, 9.0]])
USABLE = torch.tensor([[True] * 4, [True, True, True, False]])


def trained(weight: list[list[float]], bias: list[float], options: Adaptive = OPTIONS) -> AdaptiveHead:
    head = AdaptiveHead(options)
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


def test_predicted_losses_are_linear_in_the_shares() -> None:
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
    selector = ShirgSelector(budget=69, adaptive={"mode": "head"}, **SMALL)
    assert selector(features).mask_BT.sum(-1).tolist() == [69, 69]
    assert selector.may_use_less


def test_levels_are_fixed_for_training_and_share_the_head() -> None:
    features = make_features((2, 2), sizes=[(640, 480), (480, 640)])
    selector = ShirgSelector(budget=69, adaptive={"mode": "head"}, **SMALL)
    fixed = [selector.at_level(i) for i in range(3)]
    assert [f(features).mask_BT.sum(-1).tolist() for f in fixed] == [[9 + k] * 2 for k in (30, 45, 60)]
    assert selector.level is None and all(f.head is selector.head for f in fixed)
    expected: Tensor = fixed[0](features).expected_B
    expected.sum().backward()
    assert selector.head is not None
    gradient = selector.head.linear.weight.grad
    assert gradient is not None and gradient[0].abs().min() > 0 and gradient[1:].abs().max() == 0
    plain = ShirgSelector(budget=69, **SMALL)(features)
    assert plain.expected_B is None and torch.equal(plain.tokens_BTD, selector(features).tokens_BTD)


def test_the_tolerance_decides_how_early_to_stop() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    for tolerance, used in ((0.0, 69), (0.3, 54), (0.6, 39)):
        selector = ShirgSelector(budget=69, adaptive={"mode": "head", "tolerance": tolerance}, **SMALL)
        assert selector(features).mask_BT.sum().item() == used


def test_entropy_decides_how_many() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    n = features.layout.n_tokens
    peaked, flat = torch.zeros(1, n), torch.linspace(0, 1, n)[None].clone()
    peaked[0, 100:103] = 1
    options: dict[str, Any] = {"scaffold": {"size": 0}, "weights": {"neighbour": 0}}
    selector = ShirgSelector(budget=100, adaptive={"mode": "entropy", "temperature": 0.3}, **options)
    few, many = (selector(replace(features, relevance_BN=r)) for r in (peaked, flat))
    assert selector.may_use_less and few.mask_BT.shape == many.mask_BT.shape == (1, 100)
    assert (int(few.mask_BT.sum()), int(many.mask_BT.sum())) == (50, 100)
    assert {100, 101, 102} <= set(kept(few)) and set(kept(few)) <= set(
        kept(ShirgSelector(budget=100, **options)(replace(features, relevance_BN=peaked)))
    )


@pytest.mark.parametrize("newline", ["none", "row"])
def test_levels_are_shares_of_what_each_picture_may_keep(newline: str) -> None:
    """A matched budget gives each picture its own K: half of it, rounded down, and not half of the largest one."""
    features = make_features((2, 2), sizes=[(640, 480), (100, 1000), (60, 1000)])
    options: dict[str, Any] = {"budget": "matched", "newline": newline, "scaffold": {"size": 2}}
    whole = [len(kept(ShirgSelector(**options)(features), i)) for i in range(3)]
    assert whole == {"none": [109, 51, 21], "row": [95, 33, 3]}[newline]
    sure = ShirgSelector(**options, adaptive={"mode": "entropy", "temperature": 1e-3})(features)
    assert [len(kept(sure, i)) for i in range(3)] == [n // 2 for n in whole]
    head = ShirgSelector(**options, adaptive={"mode": "head"})
    for level, share in enumerate((0.5, 0.75, 1)):
        chosen = head.at_level(level)(features)
        assert [len(kept(chosen, i)) for i in range(3)] == [int(share * n) for n in whole]
    unsure = ShirgSelector(**options, adaptive={"mode": "entropy", "temperature": 1e3})(features)
    # Every tile token counts alike: 36 and 18 of the strips, which 3/4 of 51 hold and 3/4 of 21 do not.
    assert [len(kept(unsure, i)) for i in range(3)] == {"none": [109, 38, 21], "row": [95, 33, 3]}[newline]


def test_the_embedding_starts_at_zero_and_learns_at_once() -> None:
    embed = CoordEmbed(width=6)
    box = torch.rand(2, 3, 4)
    out = embed(box)
    assert out.shape == (2, 3, 6) and bool((out == 0).all())
    out.sum().backward()
    assert embed.linear.weight.grad is not None and float(embed.linear.weight.grad.abs().max()) > 0


def test_features_tell_neighbouring_cells_apart() -> None:
    left = torch.arange(54) / 54
    boxes = torch.stack([left, torch.zeros(54), left + 1 / 54, torch.full((54,), 1 / 54)], dim=-1)[None]
    features = sincos(boxes)[0]
    assert features.shape == (54, 128)
    gaps = torch.cdist(features, features) + torch.eye(54) * 9
    assert float(gaps.min()) > 0.5
    assert torch.equal(features, sincos(boxes)[0])


def test_widths_and_heights_count() -> None:
    box = torch.tensor([[[0.2, 0.2, 0.4, 0.4], [0.1, 0.1, 0.5, 0.5]]])
    features = sincos(box)[0]
    # Same centre, so that the first half of each of sine and cosine agrees; sizes differ.
    assert torch.allclose(features[0].view(4, 32)[:2], features[1].view(4, 32)[:2])
    assert not torch.allclose(features[0].view(4, 32)[2:], features[1].view(4, 32)[2:])


def test_coordinates_start_at_zero_and_then_count() -> None:
    features = make_features((2, 2))
    without = ShirgSelector(budget=69, **SMALL)
    selector = ShirgSelector(budget=69, coord_embed="sincos_linear", coord_width=16, newline="row", **SMALL)
    assert [name for name, _ in selector.named_parameters()] == ["coords.linear.weight", "coords.linear.bias"]
    rows = ShirgSelector(budget=69, newline="row", **SMALL)(features)
    assert torch.equal(selector(features).tokens_BTD, rows.tokens_BTD)
    assert selector.coords is not None
    torch.nn.init.normal_(selector.coords.linear.weight, generator=torch.Generator().manual_seed(0))
    moved = selector(features)
    changed = (moved.tokens_BTD != rows.tokens_BTD).any(-1)
    assert torch.equal(changed, moved.mask_BT & (moved.source_BT != int(Source.NEWLINE)))
    assert torch.equal(moved.index_BT, rows.index_BT) and not list(without.parameters())
