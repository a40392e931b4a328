"""Pooled: LaViDa's own sequence, token for token."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from baselines import Pooled
from baselines.pooled import pool
from shirg import Pooling, Selection, Source, TokenLayout, pooled_count_B
from tests.features import GRIDS, SIZES, layout_of, make_features
from tests.golden_data import golden_dir

NEWLINE = int(Source.NEWLINE)
GOLDEN = json.loads((golden_dir("lavida") / "splice_token_map.json").read_text())
MAPS = load_file(golden_dir("lavida") / "splice_token_map.safetensors")


def probe(layout: TokenLayout) -> torch.Tensor:
    """Tokens that hold their own position: (view, row in the view, column in the view)."""
    return torch.cat([layout.view_N[:, None], layout.cell_N2 % layout.side], dim=-1).float()[None]


def sequence(chosen: Selection, sample: int = 0) -> torch.Tensor:
    """What the language model reads, newlines marked by -1."""
    newline = (chosen.source_BT[sample] == NEWLINE)[:, None]
    return chosen.tokens_BTD[sample].masked_fill(newline, -1.0)[chosen.mask_BT[sample]]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "x".join(map(str, case.get("size_wh", ["single"]))))
def test_pooled_is_the_references_sequence(case: dict[str, list[int]]) -> None:
    single = "size_wh" not in case
    width, height = (384, 384) if single else case["size_wh"]
    cols, rows = (0, 0) if single else case["grid_wh"]
    layout = layout_of((rows, cols), side=27)
    features = make_features(layout=layout, sizes=[(width, height)], tokens=probe(layout))
    tokens = sequence(Pooled()(features))
    golden = MAPS["map_single_view" if single else f"map_{width}x{height}"]
    assert tokens.shape == golden.shape == (case["n_image_tokens"], 3)
    assert pooled_count_B(layout, features.size_B2).tolist() == [case["n_image_tokens"]]
    assert torch.allclose(tokens, golden, atol=2e-5)
    assert torch.equal(tokens[:, 0] == -1, golden[:, 0] == -1)


@pytest.mark.parametrize("grid", GRIDS)
def test_pooled_slots_depend_on_the_canvas_alone(grid: tuple[int, int]) -> None:
    features = make_features(grid, sizes=SIZES[grid])
    chosen = Pooled()(features)
    rows, cols = grid[0] * 5, grid[1] * 5
    assert chosen.mask_BT.shape[1] == 25 + (rows * (cols + 1) if rows else 1)
    assert chosen.mask_BT.sum(-1).tolist() == pooled_count_B(features.layout, features.size_B2).tolist()
    assert float(chosen.tokens_BTD[chosen.source_BT == NEWLINE].abs().max()) == 0
    used = chosen.mask_BT & (chosen.source_BT != NEWLINE)
    centre = (chosen.box_BT4[..., :2] + chosen.box_BT4[..., 2:]) / 2
    assert float(centre[used].min()) > -0.05 and float(centre[used].max()) < 1.05


def test_a_picture_so_thin_that_only_the_global_view_is_left() -> None:
    features = make_features((2, 2), side=27, sizes=[(6000, 60)], width=2)
    assert len(sequence(Pooled()(features))) == 196


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (0, 0)])
def test_flat_is_all_views_one_after_the_other(grid: tuple[int, int]) -> None:
    layout = layout_of(grid, side=6, merge="flat")
    features = make_features(layout=layout, sizes=SIZES[grid][:1], tokens=probe(layout))
    tokens = sequence(Pooled()(features))
    views = 1 + grid[0] * grid[1]
    assert tokens[:, 0].tolist() == [float(v) for v in range(views) for _ in range(9)]
    assert torch.equal(tokens[:9, 1:], tokens[-9:, 1:])


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize(
    ("grid", "merge", "size", "count"),
    [
        ((0, 0), "spatial_unpad", (384, 384), 730),
        ((0, 0), "flat", (640, 480), 729),
        ((2, 2), "spatial_unpad", (768, 768), 729 + 54 * 55),
        ((2, 2), "flat", (640, 480), 5 * 729),
    ],
)
def test_a_model_that_does_not_pool_feeds_its_tokens_as_they_are(
    grid: tuple[int, int], merge: str, size: tuple[int, int], count: int, mode: str
) -> None:
    """730 and 3,699 are the reference's counts (docs/lavida.md, "Other checkpoints")."""
    layout = replace(layout_of(grid, side=27), pooling=Pooling(side=27, mode=mode, merge=merge))
    features = make_features(layout=layout, sizes=[size], tokens=probe(layout))
    tokens = sequence(Pooled()(features))
    assert len(tokens) == count == int(pooled_count_B(layout, features.size_B2))
    newline_after = tokens[:, 0] == -1
    order = layout.order_N if merge == "spatial_unpad" else torch.arange(layout.n_tokens)
    assert torch.equal(tokens[~newline_after], features.tokens_BND[0, order])
    expected = [] if merge == "flat" else [729] if grid == (0, 0) else [729 + 55 * row + 54 for row in range(54)]
    assert newline_after.nonzero().flatten().tolist() == expected


def test_pooled_boxes_are_where_the_tokens_come_from() -> None:
    features = make_features((1, 2), side=6, sizes=[(720, 360)], width=2)
    chosen = Pooled()(features)
    # Row 0 of the mosaic: 3 windows of each tile; a tile shows 84 of its 90 pixels.
    row = chosen.box_BT4[0, 9:16]
    assert row[:, 0].tolist() == pytest.approx([0, 28 / 180, 56 / 180, 0.5, 118 / 180, 146 / 180, 1.0], abs=1e-6)
    assert row[:, 3].tolist() == pytest.approx([28 / 90] * 7, abs=1e-6)


def test_pooling_modes() -> None:
    grid = torch.arange(49.0).view(1, 7, 7, 1)
    assert pool(grid, Pooling(side=4)).shape == (1, 4, 4, 1)
    # Row 0 of 7 in 4: output 1 reads source coordinate 1.5 * 7 / 4 - 0.5 = 2.125.
    row = torch.arange(7.0).view(1, 1, 7, 1).expand(1, 7, 7, 1)
    assert pool(row, Pooling(side=4))[0, 0, :, 0].tolist() == pytest.approx([0.375, 2.125, 3.875, 5.625])
    assert pool(grid, Pooling(side=3, mode="average"))[0, 0, 0, 0] == (0 + 1 + 7 + 8) / 4
    assert pool(grid, Pooling(side=3, mode="max"))[0, 0, 0, 0] == 8
