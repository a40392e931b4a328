"""Controls: all tokens, random tokens, the largest norms, the global view alone."""

from dataclasses import replace

import pytest
import torch

from baselines import Full, GlobalOnly, NormTopK, Random
from shirg import VisionFeatures
from tests.features import GRIDS, SIZES, layout_of, make_features, permute_views


@pytest.mark.parametrize("grid", GRIDS)
def test_full_is_every_valid_token_in_reading_order(grid: tuple[int, int]) -> None:
    features = make_features(grid, side=6, sizes=SIZES[grid])
    layout = features.layout
    for newline in ("row", "none"):
        chosen = Full(newline=newline)(features)
        ends = max(layout.canvas[0], 1) if newline == "row" else 0
        assert chosen.mask_BT.shape[1] == layout.n_tokens + ends
        for sample in range(3):
            index = [i for i in layout.order_N.tolist() if features.valid_BN[sample, i]]
            expected: list[int] = []
            for i, after in zip(index, [*index[1:], None], strict=True):
                expected.append(i)
                on_canvas = layout.role_N[i] == 1
                row_ends = after is None or layout.cell_N2[i, 0] != layout.cell_N2[after, 0]
                if newline == "row" and (row_ends if on_canvas else grid == (0, 0) and after is None):
                    expected.append(-1)
            assert chosen.index_BT[sample][chosen.mask_BT[sample]].tolist() == expected


def draw(features: VisionFeatures, **options: int) -> torch.Tensor:
    return Random(**{"budget": 50, **options})(features).index_BT


def test_random_is_a_function_of_seed_and_sample() -> None:
    features = make_features(sizes=[(640, 480)] * 3)
    drawn = draw(features)
    assert torch.equal(drawn, draw(replace(features, tokens_BND=-features.tokens_BND)))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, draw(features, seed=1))
    swapped = replace(features, ids=features.ids[::-1])
    assert torch.equal(draw(swapped), drawn.flip(0))
    assert torch.equal(draw(features[1:2]), drawn[1:2])


def test_random_is_uniform_over_valid_tokens() -> None:
    layout = layout_of((1, 2), side=3)
    features = make_features(layout=layout, sizes=[(600, 400)] * 2000, width=1)
    counts = draw(features, budget=6).flatten().bincount(minlength=27).float()
    valid = features.valid_BN[0]
    assert float(counts[~valid].sum()) == 0
    share = counts[valid] / 2000
    expected = 6 / int(valid.sum())
    # Five standard deviations of a binomial share.
    assert float((share - expected).abs().max()) < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_random_draws_ranks_so_that_view_numbers_do_not_matter() -> None:
    features = make_features(sizes=[(640, 480)])
    moved = permute_views(features, (2, 0, 4, 1, 3))
    here, there = (f.layout.rank_N[draw(f)] for f in (features, moved))
    assert torch.equal(here, there)


def test_norm_topk_keeps_the_largest_and_the_smallest() -> None:
    features = make_features(
        (0, 0), side=4, sizes=[(90, 90)], tokens=torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3)
    )
    assert NormTopK(budget=3)(features).index_BT.tolist() == [[13, 14, 15]]
    assert NormTopK(budget=3, sign=-1)(features).index_BT.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("grid", GRIDS)
def test_global_only_is_the_global_view(grid: tuple[int, int]) -> None:
    features = make_features(grid, side=4, sizes=SIZES[grid])
    assert GlobalOnly()(features).index_BT.tolist() == [list(range(16))] * 3
