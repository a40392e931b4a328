"""TopV against loops and a dense solver in float64, and what each reading of its transport problem ranks by."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from baselines import TopV, topv
from baselines.topv import Marginals, norm_masses, scaling
from shirg import VisionFeatures
from tests.features import SIZES, make_features

OURS = {"marginals": "semi_relaxed", "target": "post_norm"}
"""How the mass that a source gives is read where nothing prescribes it."""


def importance(selector: TopV, grid: tuple[int, int] = (2, 2)) -> tuple[Tensor, Tensor]:
    features = make_features(grid, side=6, sizes=SIZES[grid])
    groups, _ = selector.groups(features)
    return selector.rate(features, groups), groups.valid_BGS


@pytest.mark.parametrize("read", ["total", "own"])
def test_importances_differ(read: str) -> None:
    """With equal masses on both sides, about one per cent of contrast between sources remains."""
    found, valid = importance(TopV(budget=20, importance=read, **OURS))
    spread = torch.stack([found[b, g][valid[b, g]].std() for b in range(3) for g in range(5) if valid[b, g].sum() > 5])
    assert float(spread.min()) > 0.05
    faint, _ = importance(TopV(budget=20, marginals="uniform", target="post_norm"))
    assert 0 < float(faint[0, 0].std()) < float(found[0, 0].std())


COSTS: list[dict[str, Any]] = [
    {},
    {"eps": 1.0},
    {"alpha": 0.0, "beta": 0.3},
    {"beta": 0.0, "gamma": 2.0},
    {"gamma": 2.0, "sigma": 1.0},
    {"target": "post_norm", "alpha": 3.0, "eps": 0.3},
]


@pytest.mark.parametrize("scope", ["per_view", "global"])
def test_with_norms_and_rows_last_the_cost_changes_nothing(scope: str) -> None:
    """The solver itself, run with several costs, gives each source its share of the norms; so no plan is computed."""
    features = make_features((2, 2), side=6, sizes=SIZES[(2, 2)])
    default = TopV(budget=20, scope=scope)
    groups, _ = default.groups(features)
    norms = groups(features.taps["input@-1"]).double().norm(dim=-1).masked_fill(~groups.valid_BGS, 0)
    share = norms / norms.sum(-1, keepdim=True).clamp_min(1e-9) * groups.valid_BGS.sum(-1, keepdim=True)
    assert float(share[groups.valid_BGS].std()) > 0.1
    torch.testing.assert_close(default.rate(features, groups).double(), share, rtol=1e-6, atol=0)
    for cost in COSTS:
        solver = TopV(budget=20, scope=scope, marginals="norm", importance="own", **cost)
        solver.importance = "total"
        torch.testing.assert_close(solver.transported(features, groups).double(), share, rtol=5e-6, atol=0)
        plan_matters = TopV(budget=20, scope=scope, marginals="norm_cols_last", **cost).rate(features, groups)
        assert float((plan_matters.double() - share).abs().max()) > 1e-4, cost


def test_the_default_is_a_ranking_by_norm() -> None:
    features = make_features((0, 0), side=6, sizes=[(90, 90)])
    assert TopV(budget=9).needs == {"input@-1"}
    chosen = TopV(budget=9, recover=0.0)(features).index_BT[0].tolist()
    norms = features.taps["input@-1"][0].double().norm(dim=-1)
    assert chosen == sorted(norms.argsort(descending=True)[:9].tolist())


def test_a_rare_token_gives_less_in_total_and_more_to_its_own_target() -> None:
    """Fifteen alike and one that differs: what TopV keeps first depends on how its plan is read."""
    tokens = torch.ones(1, 16, 8) + 0.01 * torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    tokens[0, 6] = torch.linspace(-1, 1, 8)
    features = make_features((0, 0), side=4, sizes=[(90, 90)], tokens=tokens)
    features.taps.update({"input@-1": tokens, "post_norm@-1": tokens + 0.3})

    def rank(read: str) -> int:
        selector = TopV(budget=4, importance=read, beta=0.0, **OURS)
        return int(
            selector.rate(features, selector.groups(features)[0])[0, 0].argsort(descending=True).tolist().index(6)
        )

    assert rank("own") == 0
    assert rank("total") == 15


def test_the_plan_by_hand() -> None:
    """Two targets, rows of the kernel, and two sources."""
    kernel = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]])

    def plan(row_updates: int, leaving: list[float], arriving: list[float]) -> Tensor:
        u, v = scaling(kernel, torch.tensor([[leaving]]), torch.tensor([[arriving]]), row_updates)
        return (v[..., :, None] * kernel * u[..., None, :])[0, 0]

    assert plan(0, [1.0, 1.0], [1.0, 1.0]).tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert plan(2, [1.0, 1.0], [1.0, 1.0]).sum(1).tolist() == pytest.approx([1, 1])
    assert abs(float(plan(2, [1.0, 1.0], [1.0, 1.0])[:, 0].sum()) - 1) < 0.05
    assert plan(3, [1.5, 0.5], [0.4, 1.6]).sum(0).tolist() == pytest.approx([1.5, 0.5])
    columns = plan(3, [1.5, 0.5], [0.4, 1.6]).sum(1).tolist()
    assert columns != pytest.approx([0.4, 1.6], abs=1e-5) and columns == pytest.approx([0.4, 1.6], abs=0.02)


def test_masses_are_norms_without_padding() -> None:
    x = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [float("nan"), 0.0], [0.0, 0.0]]]])
    valid = torch.tensor([[[True, True, False, True]]])
    assert norm_masses(x, valid).tolist() == [[[2.5, 0.5, 0.0, 0.0]]]


def unit(values: dict[Any, float]) -> dict[Any, float]:
    """The values from 0 to 1."""
    low, high = min(values.values()), max(values.values())
    return {key: (value - low) / max(high - low, 1e-9) for key, value in values.items()}


def plan_of(kernel: Tensor, leaving: Tensor, arriving: Tensor, marginals: Marginals) -> Tensor:
    """The plan [source, target] by whole matrices: the marginals are set one after the other."""
    if marginals == "semi_relaxed":
        return kernel / kernel.sum(0)
    if marginals == "uniform":
        leaving, arriving = torch.ones_like(leaving), torch.ones_like(arriving)
    plan = kernel.clone()
    for step in range(3):
        plan = plan * (arriving / plan.sum(0))
        if step < 2 or marginals == "norm":
            plan = plan * (leaving / plan.sum(1))[:, None]
    return plan


def kernel_of(features: VisionFeatures, tokens: list[int], target: str, per_view: bool, sample: int) -> Tensor:
    """exp(-cost / eps) [source, target] of one group, pair by pair."""
    layout = features.layout
    rows, cols = (4, 4) if per_view else layout.canvas

    def position(i: int) -> tuple[float, float]:
        row, col = layout.cell_N2[i].tolist()
        if per_view:
            return row % 4, col % 4
        is_global = int(layout.role_N[i]) == 0
        return ((row + 0.5) * rows / 4 - 0.5, (col + 0.5) * cols / 4 - 0.5) if is_global else (row, col)

    s, t = (features.taps[tap][sample].double() for tap in ("input@-1", f"{target}@-1"))
    f = unit({(i, j): float((s[i] - t[j]).square().sum()) for i in tokens for j in tokens})
    r = unit({(i, j): 1 - math.exp(-(math.dist(position(i), position(j)) ** 2) / 18) for i in tokens for j in tokens})
    e = unit({i: math.dist(position(i), ((rows - 1) / 2, (cols - 1) / 2)) for i in tokens})
    kernel = [[math.exp(-(0.7 * f[i, j] + 1.3 * r[i, j] + 0.5 * e[i]) / 0.2) for j in tokens] for i in tokens]
    return torch.tensor(kernel).double()


@pytest.mark.parametrize("scope", ["per_view", "global"])
@pytest.mark.parametrize("target", ["output", "post_norm"])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2)])
def test_importance_is_that_of_a_dense_solver(
    scope: str, target: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of `marginals`, read both ways."""
    monkeypatch.setattr(topv, "ROWS", 5)
    features = make_features(grid, side=4, sizes=SIZES[grid])
    options = {"alpha": 0.7, "beta": 1.3, "gamma": 0.5, "sigma": 3.0, "eps": 0.2, "target": target}
    groups, _ = TopV(budget=12, scope=scope).groups(features)
    found: dict[tuple[Marginals, str], Tensor] = {}
    for marginals in get_args(Marginals):
        for read in ("total", "own"):
            plain = (marginals, read) == ("norm", "total")
            own = {"marginals": marginals, "importance": read, **({} if plain else options)}
            found[marginals, read] = TopV(budget=12, scope=scope, **own).rate(features, groups)
    for sample in range(3):
        for g, index in enumerate(groups.index_GS.tolist()):
            tokens = [i for i in index if features.valid_BN[sample, i]]
            if not tokens:
                continue
            kernel = kernel_of(features, tokens, target, scope == "per_view", sample)
            masses = [features.taps[tap][sample][tokens].double().norm(dim=-1) for tap in ("input@-1", f"{target}@-1")]
            leaving, arriving = (mass / mass.mean() for mass in masses)
            for (marginals, read), values in found.items():
                plan = plan_of(kernel, leaving, arriving, marginals)
                expected = plan.sum(1) if read == "total" else plan.diagonal()
                got = values[sample, g][groups.valid_BGS[sample, g]].double()
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=lambda m, at=marginals: f"{at} {m}")


def test_recovered_tokens_are_evenly_spread_over_the_pruned() -> None:
    features = make_features((0, 0), side=9, sizes=[(90, 90)])
    top = TopV(budget=30, recover=0.0)(features).index_BT[0].tolist()
    some = TopV(budget=40, recover=0.25)(features).index_BT[0].tolist()
    assert set(top) < set(some)
    pruned = [i for i in range(81) if i not in top]
    positions = [pruned.index(i) for i in some if i not in top]
    gaps = [b - a for a, b in zip(positions, positions[1:], strict=False)]
    assert len(positions) == 10 and set(gaps) <= {5, 6} and 2 <= positions[0] <= 3
