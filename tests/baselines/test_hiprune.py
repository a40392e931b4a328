"""HiPrune against a loop that is written from its formulas, and its rules on small examples."""

import pytest
import torch

from baselines import HiPrune
from baselines.hiprune import around
from shirg import VisionFeatures
from tests import reference
from tests.features import SIZES, make_features

MIDDLE, DEEP = "attention@0.35", "attention@-1"


def loop(features: VisionFeatures, alpha: float) -> reference.Pick:
    """Positions are those of the raster of a token's view, padding included."""
    layout = features.layout
    order, side = layout.order_N.tolist(), layout.side

    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        if not group:
            return []
        middle, deep = (features.taps[tap][sample].tolist() for tap in (MIDDLE, DEEP))
        view = [i for i in order if layout.view_N[i] == layout.view_N[group[0]]]
        anchors = sorted(group, key=lambda i: -middle[i])[: round(quota * alpha / 5)]
        buffers = []
        for anchor in anchors:
            at = view.index(anchor)
            for step in (-1, 1, -side, side):
                near = view[min(max(at + step, 0), side * side - 1)]
                if near in group and near not in anchors + buffers:
                    buffers.append(near)
        buffers = sorted(sorted(buffers, key=view.index), key=lambda i: -deep[i])[: quota - len(anchors)]
        rest = [i for i in group if i not in anchors + buffers]
        registers = sorted(rest, key=lambda i: -deep[i])[: quota - len(anchors) - len(buffers)]
        return anchors + buffers + registers

    return pick


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (0, 0)])
@pytest.mark.parametrize("budget", [9, 24])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_choices_are_those_of_the_loop(grid: tuple[int, int], budget: int, alpha: float) -> None:
    features = make_features(grid, side=6, sizes=SIZES[grid], width=24)
    chosen = HiPrune(budget=budget, alpha=alpha)(features)
    expected = reference.in_groups(features, "per_view", budget, loop(features, alpha))
    assert [reference.kept(chosen, sample) for sample in range(3)] == expected


@pytest.mark.parametrize(
    ("anchor", "neighbours"),
    [(5, {1, 4, 6, 9}), (4, {0, 3, 5, 8}), (2, {0, 1, 3, 6}), (0, {0, 1, 4}), (14, {10, 13, 15}), (15, {11, 14, 15})],
)
def test_neighbours_are_those_of_the_raster(anchor: int, neighbours: set[int]) -> None:
    """In 4 x 4: a row's first token has a neighbour in the row above; what lies outside is the first or last token."""
    marked = torch.arange(16) == anchor
    assert set(around(marked[None, None], 4)[0, 0].nonzero().flatten().tolist()) == neighbours


def with_attention(middle: list[float], deep: list[float]) -> VisionFeatures:
    """One view of 4 x 4 or 10 x 10 tokens."""
    side = round(len(middle) ** 0.5)
    features = make_features((0, 0), side=side, sizes=[(90, 90)])
    features.taps[MIDDLE], features.taps[DEEP] = torch.tensor([middle]), torch.tensor([deep])
    return features


def test_anchors_then_neighbours_then_registers() -> None:
    middle, deep = [0.0] * 16, [i / 16 for i in range(16)]
    middle[5] = 1.0
    chosen = HiPrune(budget=7, alpha=0.8)(with_attention(middle, deep))
    assert reference.kept(chosen) == [1, 4, 5, 6, 9, 14, 15]


def test_too_many_neighbours_go_by_the_deep_layer() -> None:
    """Three tokens and one anchor with four neighbours: the anchor and the two neighbours of the most attention."""
    middle, deep = [0.0] * 16, [i / 16 for i in range(16)]
    middle[5] = 1.0
    chosen = HiPrune(budget=3, alpha=1.0)(with_attention(middle, deep))
    assert reference.kept(chosen) == [5, 6, 9]


@pytest.mark.parametrize(("budget", "anchors"), [(24, 0), (25, 0), (26, 1), (75, 2)])
def test_the_number_of_anchors_is_rounded_to_even(budget: int, anchors: int) -> None:
    """Of 10 x 10 tokens, two stand out in the middle layer, which the deep layer attends to least."""
    middle, deep = [0.0] * 100, [1.0] * 100
    for token in (33, 66):
        middle[token], deep[token] = 1.0, 0.0
    tokens = reference.kept(HiPrune(budget=budget)(with_attention(middle, deep)))
    assert len(tokens) == budget and len({33, 66} & set(tokens)) == anchors
