"""How kept tokens are spread over a picture: regions and fields, counted by hand."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from experiments.analysis.aggregate import position_gini
from experiments.token_stats import KeptSpread, TokenGeometry, TokenPlaces, spread_of
from lavida_adapter import LavidaConfig, VisionConfig
from shirg import Geometry, Pooling, Role, tiles_layout
from tests.experiments.conftest import result_of, rows_of

Eval = Callable[..., Path]
TINY = LavidaConfig(vision=VisionConfig(image_size=64, patch_size=8), image_grid_pinpoints=((128, 128),))
SQUARE, WIDE = (128, 128), (128, 64)


def places(
    size: tuple[int, int] = SQUARE, geometry: Geometry = "lavida_tiles", config: LavidaConfig = TINY
) -> TokenPlaces:
    return TokenGeometry(config, geometry)(size)


def tiles(placed: TokenPlaces, rows: slice, columns: slice) -> Tensor:
    """The tile tokens of a rectangle of canvas cells."""
    row_N, column_N = placed.layout.cell_N2.unbind(-1)
    inside_N = torch.isin(row_N, torch.arange(64)[rows]) & torch.isin(column_N, torch.arange(64)[columns])
    return torch.nonzero(inside_N & (placed.layout.role_N != Role.GLOBAL)).flatten()


def test_the_latest_sizes_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job may see thousands of sizes; what it holds of them has a limit."""
    monkeypatch.setattr("experiments.token_stats.CACHED_SIZES", 3)
    geometry = TokenGeometry(TINY)
    first = [geometry((128, height)) for height in (100, 110, 120)]
    assert [geometry((128, height)) for height in (100, 110, 120)] == first
    geometry(WIDE)
    again = geometry((128, 100))
    assert again is not first[0] and again.box_N4.equal(first[0].box_N4)
    assert geometry(WIDE) is geometry(WIDE)


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (2000, 60), (60, 2000)])
def test_a_strip_that_covers_no_tile_token(size: tuple[int, int]) -> None:
    placed = places(size)
    assert placed.eligible_N.equal(placed.valid_N) and 0 < placed.fine_area <= 1
    assert spread_of(torch.nonzero(placed.valid_N).flatten(), placed) == KeptSpread()


def test_everything_covers_everything_evenly() -> None:
    placed = places()
    found = spread_of(torch.arange(320), placed)
    assert int(placed.valid_N.sum()) == 320 and int(placed.eligible_N.sum()) == 256
    assert found == KeptSpread(1.0, 0.0, [1.0] * 64)


def test_one_region_of_sixteen() -> None:
    """The canvas has 16 x 16 cells: 16 regions of 4 x 4, and 64 fields of 2 x 2."""
    placed = places()
    found = spread_of(tiles(placed, slice(4, 8), slice(0, 4)), placed)
    assert found.coverage == 1 / 16 and found.gini == pytest.approx(15 / 16)
    assert found.kept_map is not None
    assert [i for i, share in enumerate(found.kept_map) if share] == [16, 17, 24, 25]
    assert set(found.kept_map) == {0.0, 1.0}


def test_half_of_one_region_and_one_token_of_another() -> None:
    """8, 1 and fourteen times 0 tokens: differences of 7 (once), 8 and 1 (14 times each), both ways."""
    placed = places()
    kept_T = torch.cat([tiles(placed, slice(0, 2), slice(0, 4)), tiles(placed, slice(15, 16), slice(15, 16))])
    found = spread_of(kept_T, placed)
    assert found.coverage == 2 / 16
    assert found.gini == pytest.approx(2 * (7 + 14 * 8 + 14 * 1) / (2 * 16 * 9))


def test_padding_does_not_count() -> None:
    """A wide picture fills the middle half of the canvas: 8 of 16 regions, whose tokens are its fields."""
    placed = places(WIDE)
    assert int(placed.eligible_N.sum()) == 128 and int(placed.valid_N.sum()) == 128 + 64
    found = spread_of(tiles(placed, slice(4, 12), slice(0, 16)), placed)
    assert found == KeptSpread(1.0, 0.0, [1.0] * 64)
    assert spread_of(tiles(placed, slice(4, 8), slice(0, 16)), placed).coverage == 0.5


def test_regions_begin_anew_in_each_view_and_weigh_by_their_tokens() -> None:
    """27 cells a side: six regions of 4 and one of 3, so 14 x 14 of them on 2 x 2 tiles."""
    placed = places((768, 768), config=LavidaConfig())
    whole = spread_of(torch.nonzero(placed.eligible_N).flatten(), placed)
    assert whole.coverage == 1.0 and whole.gini == 0.0
    corner = spread_of(tiles(placed, slice(24, 27), slice(24, 27)), placed)
    assert corner.coverage == pytest.approx(1 / 196)
    assert corner.gini == pytest.approx(1 - 9 / 54**2)


def test_the_coarse_view_counts_where_there_is_nothing_finer() -> None:
    placed = places()
    coarse = spread_of(torch.arange(64), placed)
    assert coarse.coverage == 0.0 and coarse.gini is None and coarse.kept_map == [0.0] * 64
    layout, every_N = tiles_layout(0, 0, 8, 8, 64, Pooling(4)), torch.ones(64, dtype=torch.bool)
    corner_N2 = layout.cell_N2.flip(-1) / 8
    alone = TokenPlaces(layout, torch.cat([corner_N2, corner_N2 + 1 / 8], dim=-1), every_N, every_N)
    found = spread_of(torch.tensor([0, 1, 9]), alone)
    assert found.coverage == 1 / 4 and found.gini == pytest.approx(3 / 4), "4 regions, three tokens in the first"
    assert found.kept_map == [float(field in (0, 1, 9)) for field in range(64)]


def test_tokens_on_one_cell_count_once() -> None:
    """Overlapping crops show a cell several times; one of its tokens is enough."""
    placed = places(geometry="seed_canvas48")
    cell_N = placed.layout.cell_N2[:, 0] * placed.layout.canvas[1] + placed.layout.cell_N2[:, 1]
    first_N = torch.tensor([int(cell) not in cell_N[:i].tolist() for i, cell in enumerate(cell_N)])
    assert 0 < int(first_N.sum()) == 14 * 14 < placed.layout.n_tokens
    every = spread_of(torch.arange(placed.layout.n_tokens), placed)
    assert spread_of(torch.nonzero(first_N).flatten(), placed) == every
    assert every.coverage == 1.0 and every.gini == 0.0


def test_no_source_token_has_no_spread() -> None:
    assert spread_of(torch.empty(0, dtype=torch.int64), places()) == KeptSpread(None, None, None)


def blocks(maps: list[list[float | None] | None]) -> pa.ChunkedArray:
    """Maps as a column of samples.parquet."""
    return pa.chunked_array([pa.array(maps, pa.list_(pa.float64()))])


def test_positions_are_even_where_selections_take_turns() -> None:
    halves = [[1.0] * 32 + [0.0] * 32, [0.0] * 32 + [1.0] * 32]
    assert position_gini(map(blocks, [halves[:1], halves[1:]])) == 0.0
    assert position_gini([blocks(halves[:1])]) == pytest.approx(0.5)
    assert position_gini([blocks([[None, 0.5, 0.5], [1.0, None, 0.0], None])]) == pytest.approx(gini_of_three())
    assert position_gini([]) is None and position_gini([blocks([None])]) is None


def gini_of_three() -> float:
    """Means over the pictures that have a token there: 1, 0.5 and 0.25."""
    return 2 * (0.5 + 0.75 + 0.25) / (2 * 3 * 1.75)


def test_selectors_on_the_tiny_geometry(eval_here: Eval) -> None:
    """A variant that guarantees coverage has all of it; one without source tokens has no value."""
    jobs = {name: eval_here(f"selector={name}", "data.n=24", "limit=6") for name in ("pooled", "full", "shirg_fixed")}
    found = {name: result_of(job)["selection"] for name, job in jobs.items()}
    assert found["pooled"] == {"coverage": None, "gini": None, "position_gini": None}
    assert found["full"]["coverage"]["mean"] == 1.0 and found["full"]["gini"]["mean"] == 0.0
    assert found["full"]["position_gini"] == 0.0
    assert found["shirg_fixed"]["coverage"]["mean"] == 1.0 and found["shirg_fixed"]["coverage"]["n"] == 6
    assert 0 < found["shirg_fixed"]["gini"]["mean"] < 1
    stored = {name: rows_of(job)[0] for name, job in jobs.items()}
    assert [stored[name]["n_valid"] for name in jobs] == [320, 320, 196]
    assert stored["pooled"]["kept_map"] is None and stored["full"]["kept_map"] == [1.0] * 64
    assert stored["shirg_fixed"]["coverage"] == 1.0
