"""The controls: LaViDa's own sequence token for token, all tokens, and chance."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from baselines import Full, Pooled, Random
from baselines.pooled import pool
from shirg import Pooling, Selection, Source, TokenLayout, VisionFeatures, pooled_count_B
from tests.features import GRIDS, SIZES, layout_of, make_features, permute_views
from tests.golden_data import golden_dir
from tests.shirg.test_geometry import COUNTS

NEWLINE = int(Source.NEWLINE)
GOLDEN = json.loads((golden_dir("lavida") / "splice_token_map.json").read_text())
MAPS = load_file(golden_dir("lavida") / "splice_token_map.safetensors")


def probe(layout: TokenLayout) -> torch.Tensor:
    """Tokens that say where they come from: (view, row in the view, column in the view)."""
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
    assert torch.allclose(tokens, golden, atol=2e-5)
    assert torch.equal(tokens[:, 0] == -1, golden[:, 0] == -1)


@pytest.mark.parametrize(("grid", "size", "count"), COUNTS)
def test_pooled_counts(grid: tuple[int, int], size: tuple[int, int], count: int) -> None:
    features = make_features(grid, side=27, sizes=[size], width=2)
    assert len(sequence(Pooled()(features))) == count == int(pooled_count_B(features.layout, features.size_B2))


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
    with pytest.raises(ValueError, match="average pooling of 7 x 7 tokens with stride 1 gives 7 per side, not 4"):
        pool(grid, Pooling(side=4, mode="average"))


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


def draw(features: VisionFeatures, **knobs: int) -> torch.Tensor:
    return Random(**{"budget": 50, **knobs})(features).index_BT


def test_random_is_a_function_of_seed_and_sample() -> None:
    features = make_features(sizes=[(640, 480)] * 3)
    drawn = draw(features)
    assert torch.equal(drawn, draw(replace(features, tokens_BND=-features.tokens_BND)))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, draw(features, seed=1))
    swapped = replace(features, ids=features.ids[::-1])
    assert torch.equal(draw(swapped), drawn.flip(0))
    assert torch.equal(draw(features[1:2]), drawn[1:2])


def test_random_leaves_the_global_generator_alone() -> None:
    features = make_features()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    here = draw(features)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(here, draw(features))


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


def test_random_draws_places_so_that_view_numbers_do_not_matter() -> None:
    features = make_features(sizes=[(640, 480)])
    moved = permute_views(features, (2, 0, 4, 1, 3))
    here, there = (f.layout.rank_N[draw(f)] for f in (features, moved))
    assert torch.equal(here, there)


def test_full_refuses_another_newline() -> None:
    with pytest.raises(ValueError, match="newline='col': choose one of none, row"):
        Full(newline="col")
