"""Layouts and their tables, against numbers worked out by hand."""

import pytest
import torch

from shirg import (
    Pooling,
    Role,
    area_weights,
    crops_layout,
    layout_tables,
    regions,
    single_layout,
    subdivide,
    tiles_layout,
)
from tests.features import GRIDS, SIZES, layout_of, make_features, permute_views

LAVIDA = dict(side=27, patch_px=14, view_px=384, pooling=Pooling(side=14))


def test_centres_and_sizes_count_the_blind_margin() -> None:
    layout = tiles_layout(2, 2, **LAVIDA)
    assert (layout.n_tokens, layout.n_views, layout.canvas, layout.canvas_px) == (3645, 5, (54, 54), (768, 768))
    # Patch (3, 5) of the tile at row 1, column 0.
    i = 729 * 3 + 27 * 3 + 5
    assert layout.view_N[i] == 3 and layout.role_N[i] == int(Role.TILE)
    assert layout.cell_N2[i].tolist() == [30, 5]
    assert layout.centre_N2[i].tolist() == pytest.approx([(14 * 5 + 7) / 768, (384 + 14 * 3 + 7) / 768])
    assert layout.size_N2[i].tolist() == pytest.approx([14 / 768, 14 / 768])
    # The same patch of the global view, placed in the picture.
    j = 27 * 3 + 5
    assert layout.role_N[j] == int(Role.GLOBAL)
    assert layout.centre_N2[j].tolist() == pytest.approx([77 / 384, 49 / 384])
    assert layout.size_N2[j].tolist() == pytest.approx([14 / 384, 14 / 384])
    assert float(layout.centre_N2[:729].max()) == pytest.approx((26 * 14 + 7) / 384)


@pytest.mark.parametrize("grid", GRIDS)
def test_shapes_follow_the_grid(grid: tuple[int, int]) -> None:
    layout = tiles_layout(*grid, **LAVIDA)
    tiles = grid[0] * grid[1]
    assert layout.n_views == 1 + tiles and layout.n_global == 729
    assert layout.canvas == (27 * grid[0], 27 * grid[1])
    assert layout.canvas_px == (384 * max(grid[0], 1), 384 * max(grid[1], 1))
    assert int((layout.role_N == int(Role.TILE)).sum()) == 729 * tiles
    cells = layout.cell_N2[layout.order_N[729:]]
    raster = torch.arange(729 * tiles)
    if tiles:
        assert torch.equal(cells, torch.stack([raster // layout.canvas[1], raster % layout.canvas[1]], dim=-1))


def test_reading_order_and_tables_do_not_depend_on_the_numbering_of_views() -> None:
    features = make_features((1, 3), sizes=[(1000, 280)])
    for views in ((3, 0, 2, 1), (1, 2, 3, 0)):
        here, there = features.layout, permute_views(features, views).layout
        for name in ("cell_N2", "role_N", "centre_N2"):
            assert torch.equal(getattr(here, name)[here.order_N], getattr(there, name)[there.order_N])
        assert torch.equal(there.rank_N[there.order_N], torch.arange(there.n_tokens))
        for name in ("border_N", "tile_N"):
            assert torch.equal(getattr(layout_tables(here), name), getattr(layout_tables(there), name))


@pytest.mark.parametrize(("cells", "windows"), [(27, 8), (27, 27), (54, 9), (8, 4), (10, 3), (7, 1)])
def test_area_weights_partition_the_line(cells: int, windows: int) -> None:
    weights = area_weights(cells, windows, torch.device("cpu")).double()
    assert torch.allclose(weights.sum(1), torch.ones(windows).double(), atol=1e-6)
    assert torch.allclose(weights.sum(0), torch.full((cells,), windows / cells).double(), atol=1e-6)
    for w in range(windows):
        for c in range(cells):
            overlap = min((c + 1) / cells, (w + 1) / windows) - max(c / cells, w / windows)
            assert float(weights[w, c]) == pytest.approx(max(overlap, 0.0) * windows, abs=1e-6)


def test_subdivide() -> None:
    boxes = subdivide(torch.tensor([[0.0, 0.5, 1.0, 1.0]]), rows=1, cols=2)
    assert boxes.tolist() == [[[0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]]


def test_tables_are_built_once_and_in_reading_order() -> None:
    layout = layout_of((2, 2), side=5)
    table = layout_tables(layout)
    assert layout_tables(layout) is table
    # One tile row: border 1 at both ends, 0 in the middle of a 5-wide tile, whatever the tile.
    canvas = table.border_N[layout.n_global :].view(10, 10)
    assert canvas[2].tolist() == [1, 0.5, 0, 0.5, 1] * 2
    assert canvas[0].tolist() == [1] * 10
    assert table.tile_N[: layout.n_global].unique().tolist() == [-1]
    assert table.tile_N[layout.n_global :].view(10, 10)[::5, ::5].tolist() == [[0, 1], [2, 3]]
    canvas_tiles = table.tile_N[layout.n_global :]
    assert canvas_tiles[table.by_tile_M].tolist() == sorted(canvas_tiles.tolist())
    assert torch.equal(table.by_tile_M[table.from_tile_M], torch.arange(100))


def test_a_layout_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        layout = layout_of((1, 2), side=5)
        layout_tables(layout)
        area_weights(5, 2, torch.device("cpu"))
    x = torch.randn(layout.n_tokens, requires_grad=True)
    (x[layout.order_N] * layout_tables(layout).border_N).sum().backward()
    (area_weights(5, 2, torch.device("cpu")) * torch.randn(5, requires_grad=True)).sum().backward()
    assert x.grad is not None


def test_moving_to_where_it_is_keeps_the_tables() -> None:
    layout = layout_of((1, 2), side=5)
    assert layout.to("cpu") is layout


@pytest.mark.parametrize("grid", GRIDS[:5])
def test_boxes_of_valid_tokens_lie_in_the_picture(grid: tuple[int, int]) -> None:
    features = make_features(grid, sizes=SIZES[grid])
    box = features.box_BN4()
    centre = (box[..., :2] + box[..., 2:]) / 2
    inside = ((centre >= 0) & (centre <= 1)).all(-1)
    assert torch.equal(inside, features.valid_BN)


def test_the_notes_canvas_holds_2304_cells() -> None:
    layout = crops_layout(48, 27, 14, Pooling(side=14))
    table = layout_tables(layout)
    assert layout.n_tokens == 3645 and len(table.candidate_MC) == 2304 and layout.overlaps
    several = (table.candidate_MC >= 0).sum(-1)
    assert torch.bincount(several).tolist() == [0, 1323, 693, 252, 0, 36]
    # Corner crops begin at pixel 0 and 294, the centre crop at 140, and all end inside the canvas of 672.
    firsts = layout.cell_N2.unflatten(0, (5, 729))[:, 0] * 14
    assert firsts.tolist() == [[0, 0], [0, 294], [294, 0], [294, 294], [140, 140]]
    assert layout.canvas_px == (672, 672) and layout.cell_N2.max() == 47
    for cell, members in enumerate(table.candidate_MC.tolist()):
        for token in members:
            assert token < 0 or layout.cell_N2[token].tolist() == [cell // 48, cell % 48]


def test_regions_partition_the_cells() -> None:
    for layout, cells, count in (
        (single_layout(48, 14, Pooling(side=24)), 4, 144),
        (make_features((2, 2), side=27, sizes=[(768, 768)], width=1).layout, 4, 245),
        (crops_layout(48, 27, 14, Pooling(side=14)), 4, 144),
    ):
        rows = regions(layout, cells, 0)
        n_cells = len(layout_tables(layout).centre_P2)
        members = rows[rows < n_cells]
        assert len(rows) == count and sorted(members.tolist()) == list(range(n_cells))
