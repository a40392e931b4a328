"""Where crops overlap: one token per canvas cell, and what becomes of the others."""

from dataclasses import replace
from typing import Any

import torch

from shirg import ShirgSelector, Source
from tests.features import geometry_layout, make_features
from tests.reference import kept

CROPS: dict[str, Any] = {"geometry": "seed_canvas48", "scaffold": {"size": 0}}
LAYOUT = geometry_layout("seed_canvas48", 6)
"""A canvas of ten cells a side; crops begin at cells 0 and 4 and, in the middle, at 2."""


def test_a_cell_is_assigned_its_most_relevant_token() -> None:
    layout = LAYOUT
    features = make_features(layout=layout, sizes=[(640, 640), (640, 480)], seed=2)
    selector = ShirgSelector(budget=60, **CROPS)
    chosen = selector(features)
    cell_N = layout.cell_N2 @ torch.tensor([layout.canvas[1], 1])
    assert features.relevance_BN is not None
    for sample in range(2):
        index = kept(chosen, sample)
        assert len({int(cell_N[i]) for i in index}) == 60, "no cell twice"
        for i in index:
            others = (cell_N == cell_N[i]).nonzero().flatten()
            assert features.relevance_BN[sample, i] == features.relevance_BN[sample, others].max()


def test_equal_relevance_goes_to_the_token_deepest_in_its_crop_then_to_the_first_crop() -> None:
    layout = LAYOUT
    features = make_features(layout=layout, sizes=[(640, 640)])
    flat = replace(features, relevance_BN=torch.zeros(1, layout.n_tokens))
    weights = {"similarity": 1.0, "neighbour": 0.3}
    index = kept(ShirgSelector(budget=100, weights=weights, **CROPS)(flat))
    view_of = {tuple(layout.cell_N2[i].tolist()): int(layout.view_N[i]) for i in index}
    assert view_of[(0, 0)] == 0 and view_of[(0, 9)] == 1 and view_of[(9, 0)] == 2 and view_of[(9, 9)] == 3
    assert view_of[(4, 4)] == 4, "two cells inside the centre crop, on the border of the others"
    assert view_of[(0, 4)] == 0, "on the border of both: the first crop"
    by_border = ShirgSelector(budget=100, dedup="border", **CROPS)(features)
    assert by_border.index_BT[0].tolist() == index


def test_tokens_without_a_cell_get_no_gradient() -> None:
    features = make_features(layout=LAYOUT, sizes=[(640, 640)], seed=2)
    x = features.tokens_BND.clone().requires_grad_()
    selector = ShirgSelector(budget=64, geometry="seed_canvas48", scaffold={"size": 2, "source": "canvas"})
    (grad,) = torch.autograd.grad(selector(replace(features, tokens_BND=x)).tokens_BTD.sum(), x)
    layout, r = features.layout, features.relevance_BN
    assert r is not None
    reached = set(grad[0].abs().sum(-1).nonzero().flatten().tolist())
    cell_N = layout.cell_N2 @ torch.tensor([layout.canvas[1], 1])
    assigned = {max((cell_N == c).nonzero().flatten().tolist(), key=lambda i: float(r[0, i])) for c in cell_N.unique()}
    assert reached == assigned, "the scaffold reaches one token of each cell, and nothing the others"


def test_means_of_cells() -> None:
    layout = LAYOUT
    features = make_features(layout=layout, sizes=[(640, 640)])
    chosen = ShirgSelector(budget=100, dedup="mean", underflow="mask", **CROPS)(features)
    for slot in range(100):
        cell = torch.tensor([slot // 10, slot % 10])
        members = (layout.cell_N2 == cell).all(-1).nonzero().flatten()
        assert torch.allclose(chosen.tokens_BTD[0, slot], features.tokens_BND[0, members].mean(0), atol=1e-6)
        assert chosen.source_BT[0, slot] == (Source.KEPT if len(members) == 1 else Source.MERGED)


def test_duplicates_fill_up_last() -> None:
    layout = LAYOUT
    features = make_features(layout=layout, sizes=[(1000, 300)])
    selector = ShirgSelector(budget=40, **CROPS)
    cells = layout.cell_N2[kept(selector(features))]
    distinct = len({tuple(c) for c in layout.cell_N2[features.valid_BN[0]].tolist()})
    assert distinct < 40 and len(cells) == 40 and len({tuple(c) for c in cells.tolist()}) == distinct
