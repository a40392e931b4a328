"""TopV against a loop, and against the degenerate reading of its transport problem."""

import math

import pytest
import torch

from baselines import TopV
from baselines.topv import transported
from tests.features import SIZES, make_features


def importance(selector: TopV, grid: tuple[int, int] = (2, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    features = make_features(grid, side=6, sizes=SIZES[grid])
    groups, _ = selector.groups(features)
    return selector.importance(features, groups), groups.valid_BGS


def test_importances_differ() -> None:
    """In a balanced problem the mass that leaves a source is prescribed; then all are equal and say nothing."""
    found, valid = importance(TopV(budget=20))
    spread = torch.stack([found[b, g][valid[b, g]].std() for b in range(3) for g in range(5) if valid[b, g].sum() > 5])
    assert float(spread.min()) > 0.05
    faint, _ = importance(TopV(budget=20, marginals="balanced_cols_last"))
    assert 0 < float(faint[0, 0].std()) < float(found[0, 0].std())


def test_the_plan_by_hand() -> None:
    """Two sources, two targets: each target takes a mass of 1, split by the kernel."""
    plan = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    assert transported(plan, valid, "semi_relaxed").flatten().tolist() == [0.75 + 0.5, 0.25 + 0.5]
    balanced = transported(plan, valid, "balanced_cols_last").flatten()
    assert float(balanced.sum()) == pytest.approx(2) and abs(float(balanced[0]) - 1) < 0.05


@pytest.mark.parametrize("scope", ["per_view", "global"])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2)])
def test_importance_is_that_of_the_loop(scope: str, grid: tuple[int, int]) -> None:
    features = make_features(grid, side=4, sizes=SIZES[grid])
    layout = features.layout
    selector = TopV(budget=12, scope=scope, alpha=0.7, beta=1.3, gamma=0.5, sigma=3.0, eps=0.2)
    groups, _ = selector.groups(features)
    found = selector.importance(features, groups)
    per_view = scope == "per_view"
    rows, cols = (4, 4) if per_view else layout.canvas

    def place(i: int) -> tuple[float, float]:
        row, col = layout.cell_N2[i].tolist()
        if per_view:
            return row % 4, col % 4
        is_global = int(layout.role_N[i]) == 0
        return ((row + 0.5) * rows / 4 - 0.5, (col + 0.5) * cols / 4 - 0.5) if is_global else (row, col)

    for sample in range(3):
        source, target = (features.taps[tap][sample].double() for tap in ("input@-1", "post_norm@-1"))
        for g, index in enumerate(groups.index_GS.tolist()):
            tokens = [i for i in index if features.valid_BN[sample, i]]
            if not tokens:
                continue
            f = {(i, j): float((source[i] - target[j]).square().sum()) for i in tokens for j in tokens}
            r = {(i, j): 1 - math.exp(-(math.dist(place(i), place(j)) ** 2) / 18) for i in tokens for j in tokens}
            e = {i: math.dist(place(i), ((rows - 1) / 2, (cols - 1) / 2)) for i in tokens}

            def unit(values: dict, key: object) -> float:
                low, high = min(values.values()), max(values.values())
                return (values[key] - low) / max(high - low, 1e-9)

            kernel = {
                (i, j): math.exp(-(0.7 * unit(f, (i, j)) + 1.3 * unit(r, (i, j)) + 0.5 * unit(e, i)) / 0.2)
                for i, j in f
            }
            column = {j: sum(kernel[i, j] for i in tokens) for j in tokens}
            expected = [sum(kernel[i, j] / column[j] for j in tokens) for i in tokens]
            got = found[sample, g][groups.valid_BGS[sample, g]]
            torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-4)


def test_recovered_tokens_are_evenly_spread_over_the_pruned() -> None:
    features = make_features((0, 0), side=9, sizes=[(90, 90)])
    top = TopV(budget=30, recover=0.0)(features).index_BT[0].tolist()
    some = TopV(budget=40, recover=0.25)(features).index_BT[0].tolist()
    assert set(top) < set(some)
    pruned = [i for i in range(81) if i not in top]
    places = [pruned.index(i) for i in some if i not in top]
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert len(places) == 10 and set(gaps) <= {5, 6} and 2 <= places[0] <= 3
