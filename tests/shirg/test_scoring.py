"""The terms of the score against loops, and by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shirg import ShirgSelector, VisionFeatures, scoring
from shirg.scoring import crop_term, neighbour_term, normalise
from tests.features import SIZES, features_for, layout_of, make_features
from tests.reference import distances, zscore_by_view


def on_grid(tokens_RCD: torch.Tensor, valid_RC: torch.Tensor, metric: str) -> torch.Tensor:
    """The neighbour term of tokens that are numbered along their grid."""
    return neighbour_term(tokens_RCD.flatten(0, 1), torch.arange(valid_RC.numel()).view_as(valid_RC), valid_RC, metric)


@pytest.mark.parametrize("metric", ["feature_l2", "feature_cos", "local_var", "position"])
@pytest.mark.parametrize("grid", [(2, 1), (1, 3)])
def test_neighbour_term_equals_the_loop(metric: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features(grid, side=5, sizes=SIZES[grid][1:2])
    layout, n = features.layout, features.layout.n_global
    x, order, valid = features.tokens_BND[0], layout.order_N, features.valid_BN[0][layout.order_N]
    assert not bool(valid.all()) or grid == (1, 3)
    slow = distances(features, 0, metric)
    for rows in (1, 3, 4, 5, 18):
        monkeypatch.setattr(scoring, "ROWS", rows)
        parts = []
        for part, shape in ((slice(n), (layout.side, layout.side)), (slice(n, None), layout.canvas)):
            term = neighbour_term(x, order[part].unflatten(0, shape), valid[part].unflatten(0, shape), metric)
            parts.append(term.flatten())
        fast = torch.cat(parts)
        assert fast[valid].tolist() == pytest.approx([slow[i] for i in order[valid].tolist()], abs=1e-6)
        assert bool((fast[~valid] == 0).all()) or metric == "position"


def test_distance_of_positions_is_a_constant_inside() -> None:
    values = on_grid(torch.zeros(4, 4, 3), torch.ones(4, 4, dtype=torch.bool), "position")
    assert float(values[1, 1]) == pytest.approx((4 + 4 * math.sqrt(2)) / 8)
    assert float(values[0, 1]) == pytest.approx((3 + 2 * math.sqrt(2)) / 5)
    assert float(values[0, 0]) == pytest.approx((2 + math.sqrt(2)) / 3)
    assert torch.equal(values[1:3, 1:3], values[1:2, 1:2].expand(2, 2))


@pytest.mark.parametrize("metric", ["feature_l2", "feature_cos", "local_var"])
def test_equal_tokens_are_at_distance_zero(metric: str) -> None:
    same = torch.randn(7).expand(6, 6, 7)
    assert float(on_grid(same, torch.ones(6, 6, dtype=torch.bool), metric).max()) < 1e-12


def test_a_token_without_valid_neighbours_gets_zero_and_zero_tokens_count() -> None:
    valid = torch.zeros(3, 3, dtype=torch.bool)
    valid[0, 0] = True
    assert float(on_grid(torch.randn(3, 3, 4), valid, "feature_l2").abs().max()) == 0
    x = torch.zeros(1, 2, 4)
    x[0, 1, 0] = 5.0
    distance = on_grid(x, torch.ones(1, 2, dtype=torch.bool), "feature_l2")
    assert distance.tolist() == [[1.0, 1.0]]


def test_overflow_is_not_silent() -> None:
    x = torch.full((2, 2, 8), 1e30)
    assert bool(on_grid(x, torch.ones(2, 2, dtype=torch.bool), "feature_l2").isnan().all())


def test_zscore_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 5.0, 5.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    z = normalise(values, valid, "zscore")
    assert z[0].tolist() == pytest.approx([-1.0, 1.0, 3.0], abs=1e-5)
    assert z[1].tolist() == [0.0, 0.0, 0.0]


def test_minmax_and_rank_by_hand() -> None:
    values = torch.tensor([[4.0, 2.0, 2.0, -9.0, 8.0]])
    valid = torch.tensor([[True, True, True, False, True]])
    assert normalise(values, valid, "minmax")[valid].tolist() == pytest.approx([1 / 3, 0, 0, 1], abs=1e-6)
    assert normalise(values, valid, "rank")[valid].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1])
    assert normalise(values, valid, "none").tolist() == values.tolist()


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-50, 50), min_size=3, max_size=12),
    norm=st.sampled_from(["zscore", "minmax", "rank"]),
    padding=st.floats(-1e6, 1e6),
)
def test_padding_never_enters_the_statistics(values: list[int], norm: str, padding: float) -> None:
    row, valid = torch.tensor([values]).float(), torch.ones(1, len(values), dtype=torch.bool)
    padded = torch.cat([row, torch.full((1, 4), padding)], dim=1)
    mask = torch.cat([valid, torch.zeros(1, 4, dtype=torch.bool)], dim=1)
    alone = normalise(row, valid, norm)
    assert torch.allclose(normalise(padded, mask, norm)[:, : len(values)], alone, atol=1e-5)
    order = row[0].argsort(stable=True)
    assert bool((alone[0][order].diff() >= -1e-6).all()), "normalising keeps the order"


def test_crop_terms() -> None:
    border, tile = torch.tensor([0.25, 1.0, 0.0, 0.5, 0.5]), torch.tensor([-1, 0, 1, 2, 3])
    centre = torch.tensor([False, False, False, False, True])
    assert crop_term("none", border, tile, centre).tolist() == [0.0] * 5
    assert crop_term("border", border, tile, centre).tolist() == border.tolist()
    assert crop_term("centre", border, tile, centre).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert crop_term("literal", border, tile, centre).tolist() == [0.0, 1.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_statistics_of_each_view(grid: tuple[int, int]) -> None:
    features = make_features(grid, side=5, sizes=SIZES[grid][1:2], seed=5)
    scores = ShirgSelector(budget=50, norm_scope="view", weights={"neighbour": 0}).score(features)[0].tolist()
    relevance = features.relevance_BN[0].tolist()
    members = features.valid_BN[0].nonzero().flatten().tolist()
    z = zscore_by_view({i: relevance[i] for i in members}, features.layout.view_N)
    assert [0.65 * z[i] for i in members] == pytest.approx([scores[i] for i in members], abs=1e-5)


def test_scores_tell_apart_what_half_precision_cannot() -> None:
    """Relevance in steps of 1e-5 around 1, in a shuffled order: in float16 all of them are equal."""
    layout = layout_of((2, 2), side=9)
    order = torch.randperm(layout.n_tokens, generator=torch.Generator().manual_seed(0))
    features = make_features(layout=layout, sizes=[(768, 768)], relevance=1 + 1e-5 * order[None])
    selector = ShirgSelector(budget=69, norm="none", weights={"similarity": 1, "neighbour": 0}, scaffold={"size": 3})
    tiles = [i for i in range(layout.n_tokens) if layout.role_N[i] == 1]
    kept = selector(features).index_BT[0, 9:].tolist()
    assert set(kept) == set(sorted(tiles, key=lambda i: -int(order[i]))[:60])


PICTURES = (0, 1, 0, 0, 1)
"""The picture of each row; what is asked about it differs."""
SHARED: list[dict[str, Any]] = [
    {"weights": {"neighbour": 0.25}},
    {"weights": {"neighbour": 0.25}, "views": "all"},
    {"weights": {"neighbour": 0.0, "variance": 0.5}, "variance_of": "neighbourhood"},
    {"weights": {"neighbour": 0.25}, "geometry": "seed_canvas48", "scaffold": {"size": 0}},
    {"weights": {"neighbour": 0.25}, "geometry": "seed_canvas48", "scaffold": {"size": 0}, "dedup": "border"},
]


def questions(selector: ShirgSelector) -> VisionFeatures:
    """Two pictures, one of them with padding, and five questions about them."""
    pictures = features_for(selector, sizes=((640, 480), (2480, 3508)))
    rows = torch.tensor(PICTURES)
    picked = {name: getattr(pictures, name)[rows] for name in ("tokens_BND", "valid_BN", "picture_B4", "size_B2")}
    base = pictures.base_count_B
    return replace(
        pictures,
        **picked,
        ids=tuple(f"question-{i}" for i in range(len(PICTURES))),
        n_valid=tuple(pictures.n_valid[i] for i in PICTURES),
        counts=None,
        relevance_BN=torch.randn(len(PICTURES), pictures.layout.n_tokens, generator=torch.Generator().manual_seed(5)),
        base_count_B=None if base is None else base[rows],
        taps={name: tap[rows] for name, tap in pictures.taps.items()},
        boxes=None,
    )


@pytest.mark.parametrize("options", SHARED, ids=str)
def test_rows_that_share_a_picture_compute_its_grids_once(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = ShirgSelector(budget=60, **options)
    features, calls = questions(selector), []
    real = scoring._on_grids_of_one
    monkeypatch.setattr(scoring, "_on_grids_of_one", lambda *args: (calls.append(1), real(*args))[1])
    expected = selector(features)
    assert len(calls) == len(PICTURES)
    found = selector(replace(features, picture_at=PICTURES))
    for name in ("tokens_BTD", "index_BT", "source_BT", "mask_BT", "scores_BN"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    by_question = "geometry" in options  # which token a cell is assigned may depend on the question
    assert len(calls) == len(PICTURES) + (len(PICTURES) if by_question else 2)
    assert not torch.equal(found.index_BT[0], found.index_BT[2]), "the question still decides"
