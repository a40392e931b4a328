"""Scaffold, summary and newlines: exact means, and where they are put."""

from typing import Any

import pytest
import torch

from experiments.bench.reference import valid_tokens, window_mean
from shirg import Role, ShirgSelector, Source, VisionFeatures, close_rows, keep, stable_topk, used_rows
from shirg.dedup import CellAssignment, assign_cells, average_cells
from shirg.scaffold import scaffold_tokens
from tests.features import PADDED, SIZES, features_for, geometry_layout, layout_of, make_features
from tests.reference import kept


def assigned(features: VisionFeatures) -> CellAssignment:
    return assign_cells(features.layout, features.valid_BN, features.relevance_BN, "relevance")


def exact(features: VisionFeatures, sample: int, size: int, source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [size * size, D] and used windows, cell by cell in double precision."""
    layout = features.layout
    shape = (layout.side, layout.side) if source == "global" else layout.canvas
    token_at = valid_tokens(features, sample, Role.GLOBAL if source == "global" else Role.TILE)
    x = features.tokens_BND[sample].double()
    found = [window_mean(x, token_at, shape, size, window) for window in range(size * size)]
    return torch.stack([mean for mean, _ in found]), torch.tensor([area > 0 for _, area in found])


@pytest.mark.parametrize(
    ("grid", "source", "size"),
    [((2, 2), "global", 4), ((2, 2), "global", 9), ((0, 0), "global", 2), ((2, 2), "canvas", 6), ((1, 3), "canvas", 4)],
)
def test_means_are_exact_areas(grid: tuple[int, int], source: str, size: int) -> None:
    features = make_features(grid, sizes=SIZES[grid], width=3)
    chosen = scaffold_tokens(features, assigned(features), size, source)
    for sample in range(3):
        means, used = exact(features, sample, size, source)
        assert torch.equal(chosen.mask_BT[sample], used)
        assert torch.allclose(chosen.tokens_BTD[sample][used].double(), means[used], atol=1e-5)
    assert bool((chosen.source_BT == int(Source.SCAFFOLD)).all()) and bool((chosen.index_BT == -1).all())


def test_gradient_is_the_share_of_the_window() -> None:
    features = make_features((2, 2), sizes=[(768, 768)], side=8, width=2)
    x = features.tokens_BND.requires_grad_()
    scaffold_tokens(features, assigned(features), 4, "global").tokens_BTD[0, 5].sum().backward()
    assert x.grad is not None
    # Window (1, 1) of 4 x 4 over 8 x 8 cells: cells (2..3, 2..3), a quarter each.
    grid = x.grad[0, :64, 0].view(8, 8)
    expected = torch.zeros(8, 8)
    expected[2:4, 2:4] = 0.25
    assert torch.allclose(grid, expected, atol=1e-6)
    assert float(x.grad[0, 64:].abs().max()) == 0


def test_boxes_partition_the_picture() -> None:
    features = make_features((2, 2), sizes=[(640, 480)], side=27, width=1)
    boxes = scaffold_tokens(features, assigned(features), 8, "global").box_BT4[0].view(8, 8, 4)
    assert boxes[0, 0, :2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert boxes[7, 7, 2:].tolist() == pytest.approx([378 / 384, 378 / 384])
    assert torch.allclose(boxes[:, :-1, 2], boxes[:, 1:, 0]) and torch.allclose(boxes[:-1, :, 3], boxes[1:, :, 1])


def test_the_scaffold_follows_the_base_models_pooled_side() -> None:
    coarse = make_features((2, 2), side=8, sizes=[(768, 768)])
    assert int((ShirgSelector(budget=80)(coarse).source_BT == int(Source.SCAFFOLD)).sum()) == 16


LOSES: dict[str, Any] = {
    # Geometry, source, other options: whether some window may be padding alone, beside tiles and in a single view.
    "default": ({}, False, True),
    "none": ({"scaffold": {"size": 0}}, False, False),
    "of the canvas": ({"scaffold": {"size": 4, "source": "canvas"}}, True, True),
    "padding counts": ({"scaffold": {"size": 4, "source": "canvas"}, "mask_padding": False}, False, False),
    "one view": ({"geometry": "single_672", "scaffold": {"size": 4, "source": "canvas"}}, False, False),
    "fovea": ({"geometry": "fovea"}, False, False),
    "its middle": ({"geometry": "fovea", "scaffold": {"size": 4, "source": "canvas"}}, True, True),
    "crops": ({"geometry": "seed_canvas48", "scaffold": {"size": 4, "source": "canvas"}}, True, True),
    "slots": ({"underflow": "mask", "scaffold": {"size": 0}}, True, True),
}


@pytest.mark.parametrize("case", LOSES)
def test_who_may_use_less_than_its_budget(case: str) -> None:
    """As said beforehand, and as it then is for a thin picture."""
    options, beside_tiles, alone = LOSES[case]
    selector = ShirgSelector(budget=27, **options)
    assert selector.may_use_less == (beside_tiles or alone)
    for grid, less in (((2, 2), beside_tiles), (PADDED, alone)):
        features = features_for(selector, grid, sizes=[(800, 200), (200, 800)])
        assert selector.may_use_less_on(features.layout) == less
        if grid == (2, 2) or "source" not in options.get("scaffold", {}):
            assert (selector(features).mask_BT.sum(-1) < 27).tolist() == [less and case != "slots"] * 2
    assert selector.may_use_less_on(layout_of((0, 0)), padding=False) == (case == "slots")


def test_a_padded_view_has_no_token_for_a_window_of_padding() -> None:
    """Twice as wide as high: of 5 x 5 windows of 1.8 cells the first and the last row are padding."""
    features = make_features(PADDED, sizes=[(800, 400), (400, 800), (400, 400)])
    chosen = ShirgSelector(budget=40)(features)
    assert features.n_valid == (45, 45, 81)
    scaffold = (chosen.source_BT == int(Source.SCAFFOLD)) & chosen.mask_BT
    assert scaffold.sum(-1).tolist() == [15, 15, 25] and chosen.mask_BT.sum(-1).tolist() == [30, 30, 40]
    rows = chosen.mask_BT[:, :25].unflatten(1, (5, 5))
    assert rows[0, :, 2].tolist() == rows[1, 2].tolist() == [False, True, True, True, False]


def test_the_summary_is_the_mean_of_what_was_left() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    chosen = ShirgSelector(budget=61, scaffold={"size": 0}, summary=True)(features)
    left = features.valid_BN[0].clone()
    left[kept(chosen)] = False
    assert chosen.source_BT[0, -1] == Source.SUMMARY and chosen.index_BT[0, -1] == -1
    assert torch.allclose(chosen.tokens_BTD[0, -1], features.tokens_BND[0, left].mean(0), atol=1e-6)
    everything = ShirgSelector(budget=features.n_valid[0] + 1, scaffold={"size": 0}, summary=True)(features)
    assert torch.allclose(everything.tokens_BTD[0, -1], features.tokens_BND[0, features.valid_BN[0]].mean(0), atol=1e-6)


@pytest.mark.parametrize("dedup", ["relevance", "border", "mean"])
@pytest.mark.parametrize("budget", [60, 151, 250, 330])
def test_the_summary_leaves_out_what_was_kept_where_slots_are_left(dedup: str, budget: int) -> None:
    """More slots than cells: a kept token is listed again behind the cells, and must still count as kept."""
    features = make_features(layout=geometry_layout("seed_canvas48"), sizes=[(640, 480)])
    options: dict[str, Any] = {"geometry": "seed_canvas48", "scaffold": {"size": 0}, "underflow": "mask"}
    n_cells = len(features.layout.cell_N2[features.valid_BN[0]].unique(dim=0))
    assert 60 < n_cells < 250
    chosen = ShirgSelector(budget=budget, summary=True, dedup=dedup, **options)(features)
    mean_of = average_cells(features) if dedup == "mean" else features
    plain = ShirgSelector(budget=budget - 1, dedup="border" if dedup == "mean" else dedup, **options)(mean_of)
    left = features.valid_BN[0].clone()
    left[kept(plain)] = False
    assert len(kept(plain)) == min(budget - 1, n_cells) and int(left.sum()) == features.n_valid[0] - len(kept(plain))
    assert torch.allclose(chosen.tokens_BTD[0, -1], mean_of.tokens_BND[0, left].mean(0), atol=1e-6)


def test_a_newline_follows_each_row() -> None:
    features = make_features((1, 2), side=3, sizes=[(756, 378), (300, 100)], width=2)
    layout = features.layout
    n_valid = features.valid_BN.sum(-1)
    chosen = keep(features, stable_topk(features.valid_BN.float(), layout.n_tokens), n_valid)
    rows = used_rows(layout, features.valid_BN)
    closed = close_rows(chosen, features, rows)
    assert closed.mask_BT.shape[1] == layout.n_tokens + 3
    for sample in range(2):
        used = closed.mask_BT[sample]
        source, index = closed.source_BT[sample][used].tolist(), closed.index_BT[sample][used].tolist()
        assert all((s == int(Source.NEWLINE)) == (i == -1) for s, i in zip(source, index, strict=True))
        lines: list[list[int]] = [[]]
        for i in index[layout.n_global :]:
            lines.append([]) if i == -1 else lines[-1].append(int(layout.cell_N2[i, 0]))
        assert lines.pop() == []
        assert lines == [[r] * 6 for r in range(3) if bool(rows[sample, r])]
        assert all(i >= 0 for i in index[: layout.n_global]), "the global view has no newlines"
    newline = (closed.source_BT == int(Source.NEWLINE)) & closed.mask_BT
    assert float(closed.tokens_BTD[newline].abs().max()) == 0
    assert bool((closed.box_BT4[newline][:, 0] == 1).all())


def test_rows_of_padding_have_no_newline() -> None:
    features = make_features((2, 2), sizes=[(768, 300), (768, 768)])
    rows = used_rows(features.layout, features.valid_BN)
    assert bool(rows[1].all()) and rows[0].nonzero().flatten().tolist() == list(range(6, 13))
    canvas = features.valid_BN[0, features.layout.order_N[81:]].view(18, 18)
    assert torch.equal(rows[0], canvas.any(1))


def test_a_single_view_is_closed_once_at_its_end() -> None:
    features = make_features((0, 0), side=3, sizes=SIZES[(0, 0)][:1], width=2)
    everything = keep(features, torch.arange(9)[None], torch.tensor([9]))
    closed = close_rows(everything, features, used_rows(features.layout, features.valid_BN))
    assert closed.index_BT.tolist() == [[*range(9), -1]] and bool(closed.mask_BT.all())


def test_newlines_come_on_top_of_a_budget_in_numbers() -> None:
    features = make_features((2, 2), sizes=[(768, 768), (768, 300)])
    chosen = ShirgSelector(budget=69, newline="row", scaffold={"size": 3})(features)
    assert chosen.mask_BT.shape[1] == 69 + 18
    assert (chosen.mask_BT & (chosen.source_BT == int(Source.NEWLINE))).sum(-1).tolist() == [18, 7]
    plain_rows = ShirgSelector(budget=69, scaffold={"size": 3})(features)
    assert [kept(chosen, s) for s in range(2)] == [kept(plain_rows, s) for s in range(2)]
