"""Even grids: ordered dithering, each view by itself."""

import torch

from baselines import UniformGrid
from shirg import dither
from tests.features import SIZES, make_features


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
