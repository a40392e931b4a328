"""Controls that do not look, or look too well: even grids, norms, the global view, the oracle."""

from dataclasses import replace

import pytest
import torch

from baselines import GlobalOnly, NormTopK, Oracle, UniformGrid
from baselines.uniform_grid import dither
from experiments.metrics import entity_recall
from experiments.metrics.recall import target_tokens
from tests.features import GRIDS, SIZES, make_features


def test_a_quarter_of_a_grid_is_every_second_token_of_every_second_row() -> None:
    features = make_features((0, 0), side=8, sizes=[(90, 90)])
    index = UniformGrid(budget=16)(features).index_BT[0]
    assert index.tolist() == [8 * row + col for row in range(0, 8, 2) for col in range(0, 8, 2)]
    half = UniformGrid(budget=32)(features).index_BT[0]
    assert all((i // 8 + i % 8) % 2 == 0 for i in half.tolist()), "half of it is a chequerboard"


def test_the_dither_is_a_permutation_and_even_at_every_count() -> None:
    cell = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    order = dither(cell, bits=4)
    assert sorted(order.tolist()) == list(range(256))
    for count in (4, 16, 60, 100, 200):
        lit = (order < count).view(16, 16).float()
        quarters = [int(lit[r : r + 8, c : c + 8].sum()) for r in (0, 8) for c in (0, 8)]
        assert max(quarters) - min(quarters) <= 1


def test_uniform_grid_spares_padding_and_keeps_the_share_of_each_view() -> None:
    features = make_features((2, 2), side=9, sizes=SIZES[(2, 2)])
    chosen = UniformGrid(budget=45)(features)
    assert features.layout.view_N[chosen.index_BT[0]].bincount().tolist() == [9] * 5


def test_norm_topk_keeps_the_largest_and_the_smallest() -> None:
    features = make_features(
        (0, 0), side=4, sizes=[(90, 90)], tokens=torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3)
    )
    assert NormTopK(budget=3)(features).index_BT.tolist() == [[13, 14, 15]]
    assert NormTopK(budget=3, sign=-1)(features).index_BT.tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="sign=0: give 1 or -1"):
        NormTopK(budget=3, sign=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_global_only_is_the_global_view(grid: tuple[int, int]) -> None:
    features = make_features(grid, side=4, sizes=SIZES[grid])
    assert GlobalOnly()(features).index_BT.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("grid", GRIDS)
def test_the_oracle_keeps_all_evidence_that_fits(grid: tuple[int, int]) -> None:
    features = make_features(grid, sizes=SIZES[grid])
    assert features.boxes is not None
    tiles = features.layout.role_N != 0 if grid != (0, 0) else features.layout.role_N == 0
    chosen = Oracle(budget=60)(features)
    for sample, boxes in enumerate(features.boxes):
        where = {
            "boxes": boxes,
            "token_box_N4": features.box_BN4()[sample],
            "eligible_N": tiles & features.valid_BN[sample],
        }
        n = int(target_tokens(**where).sum())
        assert 0 < n <= 60
        assert entity_recall(**where, kept_T=chosen.index_BT[sample]) == 1.0
        only = Oracle(budget=n)(features).index_BT[sample]
        assert torch.equal(only.sort().values, torch.where(target_tokens(**where))[0])


def test_the_oracle_needs_boxes() -> None:
    features = make_features()
    for boxes in (None, (((0.1, 0.1, 0.2, 0.2),), ())):
        with pytest.raises(ValueError, match="sample 'picture-[01]' has no boxes: choose a dataset with boxes"):
            Oracle(budget=20)(replace(features, boxes=boxes))
