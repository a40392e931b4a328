"""OTPrune against a loop over determinants that is written from its formulas."""

from dataclasses import replace

import pytest
import torch

from baselines import OTPrune
from shirg import VisionFeatures
from tests import reference
from tests.features import SIZES, make_features


def loop(features: VisionFeatures, gamma: float) -> reference.Pick:
    """The pick that makes the determinant of the picks' minor largest."""

    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        x = features.tokens_BND[sample, group].double()
        v = torch.stack([channel / channel.norm() for channel in x.T], dim=1)
        similar = v @ v.T
        kernel = torch.eye(len(group)).double() + gamma * similar @ similar.T
        chosen = list[int]()
        while len(chosen) < quota:
            free = [i for i in range(len(group)) if i not in chosen]
            chosen.append(max(free, key=lambda i: float(torch.logdet(kernel[[*chosen, i]][:, [*chosen, i]]))))
        return [group[i] for i in chosen]

    return pick


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (0, 0)])
@pytest.mark.parametrize("gamma", [0.01, 2.0])
def test_choices_are_those_of_the_loop(grid: tuple[int, int], gamma: float) -> None:
    features = make_features(grid, side=6, sizes=SIZES[grid], width=24)
    for budget in (8, 21):
        chosen = OTPrune(budget=budget, gamma=gamma)(features)
        expected = reference.in_groups(features, "per_view", budget, loop(features, gamma))
        assert [reference.kept(chosen, sample) for sample in range(3)] == expected


def test_a_channel_of_another_scale_changes_nothing() -> None:
    """Channels are scaled to length 1, so one that is a hundred times larger weighs the same."""
    features = make_features((2, 2), sizes=SIZES[(2, 2)])
    scale = torch.ones(16).index_fill_(0, torch.tensor([3]), 128.0)
    larger = replace(features, tokens_BND=features.tokens_BND * scale)
    selector = OTPrune(budget=60)
    assert torch.equal(selector(features).index_BT, selector(larger).index_BT)


def test_the_space_says_which_tokens_it_gets() -> None:
    assert OTPrune(budget=3).stage == "post" and OTPrune(budget=3, space="encoder").stage == "pre"
