"""Where crops overlap: one token per canvas cell, and what becomes of the others."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from shirg import ShirgSelector, Source, UserError
from shirg.dedup import assign_cells
from shirg.merging import match_neighbours
from shirg.options import Merging
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


MERGING: dict[str, Any] = {**CROPS, "merge": {"mode": "tome", "share": 0.5}}
PICTURES: list[tuple[int, int]] = [(640, 480), (900, 200), (100, 1000), (1000, 1000)]


@pytest.mark.parametrize("size", PICTURES, ids=str)
def test_duplicates_of_a_merged_cell_do_not_fill_up(size: tuple[int, int]) -> None:
    """They would be the same mean once more. Every budget that is not refused is met, by tokens that all differ."""
    features = make_features(layout=geometry_layout("seed_canvas48"), sizes=[size])
    layout = features.layout
    at = layout.cell_N2 @ torch.tensor([layout.canvas[1], 1])
    white = layout.cell_N2.sum(-1) % 2 == 0
    cells = Counter(at[features.valid_BN[0]].tolist())
    joins = sum(_joins(c, set(cells), layout.canvas[1]) for c in cells)
    on_black = sum(n - 1 for c, n in cells.items() if not white[at == c][0])
    have = sum(cells.values()) - min(joins, layout.canvas[0] * layout.canvas[1] // 2) - on_black
    for budget in (15, (len(cells) - joins + have) // 2, have):
        chosen = ShirgSelector(budget=budget, **MERGING)(features)
        tokens = chosen.tokens_BTD[0]
        assert bool(chosen.mask_BT.all()) and tokens.shape[0] == budget
        assert float((torch.cdist(tokens, tokens) + 9 * torch.eye(budget)).min()) > 1e-3
    assert int((chosen.source_BT == int(Source.MERGED)).sum()) >= 5
    of_kept = at[kept(chosen)]
    assert len(of_kept) > len(of_kept.unique()), "duplicates of other cells do fill up"
    with pytest.raises(UserError, match=f"asks for {have + 1} tokens, but picture 'picture-0' has {have} tokens"):
        ShirgSelector(budget=have + 1, **MERGING)(features)


def _joins(cell: int, cells: set[int], columns: int) -> bool:
    """Whether a cell can join a neighbour: a white field of a chessboard with a neighbour that is not padding."""
    row, col = divmod(cell, columns)
    around = [(row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)]
    return (row + col) % 2 == 0 and any(0 <= c < columns and r * columns + c in cells for r, c in around)


@pytest.mark.parametrize("share", [0.07, 0.5])
@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (0, 0)])
def test_a_picture_loses_to_merging_what_it_can(grid: tuple[int, int], share: float) -> None:
    """Of a picture that fills little of its canvas fewer cells join than the share of the canvas says."""
    sizes = [(640, 480), (100, 1000), (1000, 100), (1, 1000)]
    features = make_features(grid, sizes=sizes)
    layout, merging = features.layout, Merging(mode="tome", share=share)
    assigned = assign_cells(layout, features.valid_BN, None, "border")
    merge = match_neighbours(layout, features.tokens_BND, assigned, merging.count(layout))
    joined_B = (merge.step_BRC >= 0).sum((1, 2))
    assert features.counts is not None
    assert joined_B.tolist() == [min(merging.count(layout), known.joinable) for known in features.counts]
    for sample, n in enumerate(features.n_valid):
        options = {"scaffold": {"size": 0}, "merge": {"mode": "tome", "share": share}}
        have = n - int(joined_B[sample])
        one = features[sample : sample + 1]
        assert ShirgSelector(budget=have, **options)(one).mask_BT.sum() == have
        with pytest.raises(UserError, match=f"picture 'picture-{sample}' has {have} tokens to choose from"):
            ShirgSelector(budget=have + 1, **options)(one)
