"""The terms of the score against loops, and their values by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shirg import ShirgSelector, scoring
from shirg.scoring import crop_term, neighbour_term, normalise
from tests.features import SIZES, layout_of, make_features
from tests.shirg import plain

METRICS = ("feature_l2", "feature_cos", "local_var", "position")


def on_grid(tokens_RCD: torch.Tensor, valid_RC: torch.Tensor, metric: str) -> torch.Tensor:
    """The neighbour term of tokens that are numbered along their grid."""
    return neighbour_term(tokens_RCD.flatten(0, 1), torch.arange(valid_RC.numel()).view_as(valid_RC), valid_RC, metric)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 18])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("grid", [(2, 1), (1, 3)])
def test_neighbour_term_equals_the_loop(
    metric: str, grid: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "ROWS", rows)
    features = make_features(grid, side=5, sizes=SIZES[grid][1:2])
    layout, n = features.layout, features.layout.n_global
    x, order, valid = features.tokens_BND[0], layout.order_N, features.valid_BN[0][layout.order_N]
    assert not bool(valid.all()) or grid == (1, 3)
    parts = []
    for part, shape in ((slice(n), (layout.side, layout.side)), (slice(n, None), layout.canvas)):
        term = neighbour_term(x, order[part].unflatten(0, shape), valid[part].unflatten(0, shape), metric)
        parts.append(term.flatten())
    fast = torch.cat(parts)
    slow = torch.tensor(plain.distance(features, 0, metric))[layout.order_N]
    assert torch.allclose(fast[valid], slow[valid], atol=1e-6)
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


@settings(max_examples=40, deadline=None, derandomize=True)
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


def test_scores_tell_apart_what_half_precision_cannot() -> None:
    """Relevance in steps of 1e-5 around 1, in a shuffled order: in float16 all of them are equal."""
    layout = layout_of((2, 2), side=9)
    place = torch.randperm(layout.n_tokens, generator=torch.Generator().manual_seed(0))
    features = make_features(layout=layout, sizes=[(768, 768)], relevance=1 + 1e-5 * place[None])
    gate = ShirgSelector(budget=69, norm="none", weights={"similarity": 1, "neighbor": 0}, scaffold={"size": 3})
    tiles = [i for i in range(layout.n_tokens) if layout.role_N[i] == 1]
    kept = gate(features).index_BT[0, 9:].tolist()
    assert set(kept) == set(sorted(tiles, key=lambda i: -int(place[i]))[:60])
