"""HoloV against a loop that is written from its formulas, and its rules on small examples."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from baselines import HoloV
from shirg import VisionFeatures
from tests import reference
from tests.features import SIZES, differs, make_features

TAP = "attention@-1"


def scores_of(features: VisionFeatures, sample: int, crop: list[int]) -> dict[int, float]:
    a = {i: float(features.taps[TAP][sample, i]) for i in crop}
    if len(crop) == 1:
        return a
    x = features.tokens_BND[sample].double()
    unit = {i: x[i] / (x[i].norm() + 1e-6) for i in crop}
    variance = {}
    for i in crop:
        row = [0.0 if i == j else float(unit[i] @ unit[j]) for j in crop]
        mean = sum(row) / (len(crop) - 1)
        variance[i] = sum((s - mean) ** 2 for s in row) / (len(crop) - 1)
    level = sum(1000 * a[i] for i in crop) / len(crop)
    variation = sum(variance.values()) / len(crop)
    return {i: 1000 * a[i] + 0.09 * variance[i] * level / (variation + 1e-6) for i in crop}


def loop(features: VisionFeatures, crops: int, rank_by: str) -> reference.Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        sizes = [len(group) // crops + (c < len(group) % crops) for c in range(crops)]
        parts = [group[sum(sizes[:c]) : sum(sizes[: c + 1])] for c in range(crops) if sizes[c]]
        score = [scores_of(features, sample, part) for part in parts]
        means = [sum(s.values()) / len(s) for s in score]
        weights = [mean / (sum(means) + 1e-6) for mean in means]
        given = [int(quota * weight) for weight in weights]
        missing = quota - sum(given)
        for c in sorted(range(len(parts)), key=lambda c: -weights[c])[:missing]:
            given[c] += 1
        kept = []
        for part, found, count in zip(parts, score, given, strict=True):
            by = found if rank_by == "score" else {i: float(features.taps[TAP][sample, i]) for i in part}
            kept += sorted(part, key=lambda i: -by[i])[:count]
        return kept

    return pick


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (0, 0)])
@pytest.mark.parametrize("scope", ["per_view", "global"])
@pytest.mark.parametrize("crops", [1, 5, 24])
@pytest.mark.parametrize("rank_by", ["attention", "score"])
def test_choices_are_those_of_the_loop(grid: tuple[int, int], scope: Any, crops: int, rank_by: Any) -> None:
    """With 24 crops a padded view has crops of two tokens, of one and of none."""
    features = make_features(grid, side=6, sizes=SIZES[grid], width=24)
    for budget in (9, 30):
        chosen = HoloV(budget=budget, scope=scope, crops=crops, rank_by=rank_by)(features)
        expected = reference.in_groups(features, scope, budget, loop(features, crops, rank_by))
        assert [reference.kept(chosen, sample) for sample in range(3)] == expected


def with_attention(attention: list[float]) -> VisionFeatures:
    """One view of 4 x 4 tokens: with four crops, a row is a crop."""
    features = make_features((0, 0), side=4, sizes=[(90, 90)])
    features.taps[TAP] = torch.tensor([attention])
    return features


def test_what_a_full_crop_cannot_take_is_not_given_to_others() -> None:
    """The weights are .72, .12, .09 and .07: of ten slots 8, 2, 0 and 0. The first row has four tokens."""
    features = with_attention([0.72] * 4 + [0.1, 0.12, 0.2, 0.06] + [0.09] * 4 + [0.07] * 4)
    chosen = HoloV(budget=10, crops=4)(features)
    assert reference.kept(chosen) == [0, 1, 2, 3, 5, 6]
    assert chosen.mask_BT.tolist() == [[True] * 6 + [False] * 4]


def test_missing_tokens_go_to_the_largest_weights() -> None:
    """.4, .3, .2 and .1 of seven: 2, 2, 1 and 0 after rounding down. The two missing go to the first two rows."""
    features = with_attention([0.4] * 4 + [0.3] * 4 + [0.2] * 4 + [0.1] * 4)
    assert reference.kept(HoloV(budget=7, crops=4)(features)) == [0, 1, 2, 4, 5, 6, 8]


def test_only_scores_read_the_cosines() -> None:
    """In the mean score of a crop the mean variance cancels, so ranking by attention keeps the same of any tokens."""
    features = make_features((2, 2), sizes=SIZES[(2, 2)])
    others = replace(features, tokens_BND=torch.randn(3, 405, 16, generator=torch.Generator().manual_seed(1)))
    for rank_by, depends in (("attention", False), ("score", True)):
        selector = HoloV(budget=60, rank_by=rank_by)
        assert torch.equal(selector(features).index_BT, selector(others).index_BT) != depends


def test_the_space_says_which_tokens_it_gets() -> None:
    assert HoloV(budget=3).stage == "post" and HoloV(budget=3, space="encoder").stage == "pre"


def test_padding_is_taken_out_before_the_picture_is_split() -> None:
    """Whatever stands in the padding: the kept tokens are the same."""
    features = make_features((2, 2), sizes=SIZES[(2, 2)])
    noise = torch.randn(features.tokens_BND.shape, generator=torch.Generator().manual_seed(2))
    invalid = ~features.valid_BN
    tokens = torch.where(invalid[..., None], noise, features.tokens_BND)
    attention = features.taps[TAP].masked_fill(invalid, 0.5)
    other = replace(features, tokens_BND=tokens, taps={**features.taps, TAP: attention})
    selector = HoloV(budget=60, rank_by="score")
    assert bool(invalid.any()) and not differs(selector(features), selector(other))
