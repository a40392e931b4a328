"""TopV against a loop, and against the degenerate reading of its transport problem."""

import math
from typing import Any

import pytest
import torch

from baselines import TopV, topv
from baselines.topv import Marginals, scaling
from tests.features import SIZES, make_features


def importance(selector: TopV, grid: tuple[int, int] = (2, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    features = make_features(grid, side=6, sizes=SIZES[grid])
    groups, _ = selector.groups(features)
    return selector.rate(features, groups), groups.valid_BGS


@pytest.mark.parametrize("read", ["total", "own"])
def test_importances_differ(read: str) -> None:
    """In a balanced problem the mass that leaves a source is prescribed; then all importances are equal."""
    found, valid = importance(TopV(budget=20, importance=read))
    spread = torch.stack([found[b, g][valid[b, g]].std() for b in range(3) for g in range(5) if valid[b, g].sum() > 5])
    assert float(spread.min()) > 0.05
    faint, _ = importance(TopV(budget=20, marginals="balanced_cols_last"))
    assert 0 < float(faint[0, 0].std()) < float(found[0, 0].std())


def test_a_rare_token_gives_less_in_total_and_more_to_its_own_target() -> None:
    """Fifteen alike and one that differs: what TopV keeps first depends on how its plan is read."""
    tokens = torch.ones(1, 16, 8) + 0.01 * torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    tokens[0, 6] = torch.linspace(-1, 1, 8)
    features = make_features((0, 0), side=4, sizes=[(90, 90)], tokens=tokens)
    features.taps.update({"input@-1": tokens, "post_norm@-1": tokens + 0.3})

    def rank(read: str) -> int:
        selector = TopV(budget=4, importance=read, beta=0.0)
        return int(
            selector.rate(features, selector.groups(features)[0])[0, 0].argsort(descending=True).tolist().index(6)
        )

    assert rank("own") == 0
    assert rank("total") == 15


def test_the_plan_by_hand() -> None:
    """Two targets, two sources: each target, a row, takes a mass of 1, split by the kernel."""
    kernel = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]])

    def plan(marginals: Marginals) -> torch.Tensor:
        u, v = scaling(kernel, torch.ones(1, 1, 2, dtype=torch.bool), marginals)
        return (v[..., :, None] * kernel * u[..., None, :])[0, 0]

    assert plan("semi_relaxed").tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert plan("balanced_cols_last").sum(1).tolist() == pytest.approx([1, 1])
    assert abs(float(plan("balanced_cols_last")[:, 0].sum()) - 1) < 0.05


def unit(values: dict[Any, float]) -> dict[Any, float]:
    """The values from 0 to 1."""
    low, high = min(values.values()), max(values.values())
    return {key: (value - low) / max(high - low, 1e-9) for key, value in values.items()}


@pytest.mark.parametrize("scope", ["per_view", "global"])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2)])
def test_importance_is_that_of_the_loop(scope: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topv, "ROWS", 5)
    features = make_features(grid, side=4, sizes=SIZES[grid])
    layout = features.layout
    options = {"budget": 12, "scope": scope, "alpha": 0.7, "beta": 1.3, "gamma": 0.5, "sigma": 3.0, "eps": 0.2}
    selectors = [TopV(**options), TopV(**options, importance="own")]
    groups, _ = selectors[0].groups(features)
    total_BGS, own_BGS = (selector.rate(features, groups) for selector in selectors)
    per_view = scope == "per_view"
    rows, cols = (4, 4) if per_view else layout.canvas

    def position(i: int) -> tuple[float, float]:
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
            r = {(i, j): 1 - math.exp(-(math.dist(position(i), position(j)) ** 2) / 18) for i in tokens for j in tokens}
            e = {i: math.dist(position(i), ((rows - 1) / 2, (cols - 1) / 2)) for i in tokens}

            f, r, e = unit(f), unit(r), unit(e)
            kernel = {(i, j): math.exp(-(0.7 * f[i, j] + 1.3 * r[i, j] + 0.5 * e[i]) / 0.2) for i, j in f}
            column = {j: sum(kernel[i, j] for i in tokens) for j in tokens}
            total = [sum(kernel[i, j] / column[j] for j in tokens) for i in tokens]
            own = [kernel[i, i] / column[i] for i in tokens]
            valid = groups.valid_BGS[sample, g]
            for found, expected in ((total_BGS, total), (own_BGS, own)):
                got = found[sample, g][valid].double()
                torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=1e-3, atol=1e-4)


def test_recovered_tokens_are_evenly_spread_over_the_pruned() -> None:
    features = make_features((0, 0), side=9, sizes=[(90, 90)])
    top = TopV(budget=30, recover=0.0)(features).index_BT[0].tolist()
    some = TopV(budget=40, recover=0.25)(features).index_BT[0].tolist()
    assert set(top) < set(some)
    pruned = [i for i in range(81) if i not in top]
    positions = [pruned.index(i) for i in some if i not in top]
    gaps = [b - a for a, b in zip(positions, positions[1:], strict=False)]
    assert len(positions) == 10 and set(gaps) <= {5, 6} and 2 <= positions[0] <= 3
