"""Rankings: representatives of regions, diversity, groups that only fill up; and merging before them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from shirg import Pooling, ShirgSelector, Source, layout_tables, regions, single_layout
from shirg.topk import evidence_first, tiered_topk
from tests.cases import variant
from tests.features import features_for, make_features
from tests.reference import kept


def test_tiers_come_one_after_the_other_and_equal_scores_in_order() -> None:
    first = (
        torch.tensor([[4, 5, 6, 7]]),
        torch.tensor([[1.0, 3.0, 3.0, 9.0]]),
        torch.tensor([[True, True, True, False]]),
    )
    second = (torch.tensor([[0, 1]]), torch.tensor([[50.0, 60.0]]), torch.tensor([[True, True]]))
    tokens, usable = tiered_topk([first, second], 5)
    assert tokens.tolist() == [[5, 6, 4, 1, 0]] and usable.tolist() == [5]


@pytest.mark.parametrize("name", ["shirg_v2", "shirg_fixed", "shirg_x"])
@pytest.mark.parametrize("seed", range(5))
def test_every_region_keeps_a_token(name: str, seed: int) -> None:
    selector = variant(name, budget=80)
    features = features_for(selector, sizes=[(640, 480), (1000, 300)], seed=seed)
    rows = regions(features.layout, 4, 0)
    if name == "shirg_v2":
        assert len(rows) == 5 * 9
    cells = layout_tables(features.layout).grid_cell_N
    chosen = selector(features)
    for sample in range(2):
        taken = set(cells[kept(chosen, sample)].tolist())
        usable = set(cells[features.valid_BN[sample]].tolist())
        for region in rows.tolist():
            assert not usable & set(region) or taken & set(region)


def test_diversity_picks_one_by_one() -> None:
    features = make_features((2, 2), side=5, sizes=[(768, 768)])
    selector = ShirgSelector(budget=12, diversity={"mode": "mmr", "weight": 0.7}, scaffold={"size": 0})
    scores = selector.score(features)[0].double()
    x = torch.nn.functional.normalize(features.tokens_BND[0].double(), dim=-1)
    tiles = (features.layout.role_N == 1).nonzero().flatten().tolist()
    picked: list[int] = []
    for _ in range(12):
        worth = {i: scores[i] - (0.7 * (x[i] @ x[picked].T).max() if picked else 0) for i in tiles if i not in picked}
        picked.append(max(worth, key=lambda i: float(worth[i])))
    assert kept(selector(features)) == sorted(picked, key=lambda i: int(features.layout.rank_N[i]))
    assert kept(selector(features)) != kept(ShirgSelector(budget=12, scaffold={"size": 0})(features))


def test_evidence_by_score_and_the_rest_in_an_even_order() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 9.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    usable = torch.tensor([[True, True, True, False, True], [True] * 5])
    even = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    found = evidence_first(scores, usable, torch.tensor([2, 1]), None, even)
    best = found.masked_fill(~usable, float("-inf")).argsort(dim=-1, descending=True).tolist()
    assert best[0][:4] == [0, 2, 4, 1], (
        "the best two, then the even order without them; the unusable one is not counted"
    )
    assert best[1] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(("mass", "n"), [(0.5, 1), (0.83, 1), (0.9, 2), (0.97, 3), (0.999999, 3)])
def test_the_mass_of_the_scores_says_how_much_is_evidence(mass: float, n: int) -> None:
    """The shares of the best one, two and three are 0.831, 0.944 and 0.985; at most three are taken."""
    scores = torch.tensor([[0.0, 4.0, 1.0, 2.0, -9.0]])
    found = evidence_first(scores, torch.ones(1, 5, dtype=torch.bool), torch.tensor([3]), mass, torch.zeros(5))
    assert int((found > 0).sum()) == n


@pytest.mark.parametrize("budget", [20, "matched"])
def test_the_context_is_even_at_every_budget(budget: Any) -> None:
    """The best half of what the scaffold leaves, as without a context; the rest fills the order of the dither."""
    features = make_features((2, 2), side=8, sizes=[(768, 768), (640, 400)])
    ranked = ShirgSelector(budget=budget, scaffold={"size": 2})
    selector = ShirgSelector(budget=budget, scaffold={"size": 2}, allocation={"mode": "evidence_context"})
    chosen, before = selector(features), ranked(features)
    assert torch.equal(chosen.mask_BT.sum(-1), before.mask_BT.sum(-1))
    cells, even_P = layout_tables(features.layout).grid_cell_N, layout_tables(features.layout).even_P
    assert sorted(even_P.tolist()) == list(range(len(even_P)))
    for b in range(2):
        n = int(before.mask_BT[b].sum()) - 4
        scores = ranked.score(features)[b]
        tiles = [
            i for i in features.layout.order_N.tolist() if features.layout.role_N[i] == 1 and features.valid_BN[b, i]
        ]
        best = sorted(tiles, key=lambda i: -float(scores[i]))[: (n + 1) // 2]
        rest = sorted((i for i in tiles if i not in best), key=lambda i: float(even_P[cells[i]]))[: n - len(best)]
        assert set(kept(chosen, b)) == {*best, *rest}
    few = ShirgSelector(budget=60, scaffold={"size": 0}, allocation={"mode": "evidence_context", "evidence": 3})
    assert (
        len(set(kept(few(features), 0)) - set(kept(ShirgSelector(budget=3, scaffold={"size": 0})(features), 0))) == 57
    )


def test_evidence_is_a_share_of_what_an_adaptive_budget_keeps() -> None:
    """Half of the 30 tokens that a picture keeps, not half of the 60 that it might have kept."""
    features = make_features((2, 2), side=8, sizes=[(768, 768)])
    adaptive = {"mode": "entropy", "levels": [0.5, 1.0], "temperature": 1e-3}
    options: Any = {"scaffold": {"size": 0}, "adaptive": adaptive}
    ranked = ShirgSelector(budget=60, **options)
    divided = ShirgSelector(budget=60, allocation={"mode": "evidence_context"}, **options)(features)
    assert len(kept(ranked(features), 0)) == len(kept(divided, 0)) == 30
    best = sorted(kept(ranked(features), 0), key=lambda i: -float(ranked.score(features)[0, i]))
    even_P, cell_N = layout_tables(features.layout).even_P, layout_tables(features.layout).grid_cell_N
    tiles = [i for i in features.layout.order_N.tolist() if features.layout.role_N[i] == 1]
    rest = sorted((i for i in tiles if i not in best[:15]), key=lambda i: float(even_P[cell_N[i]]))[:15]
    assert set(kept(divided, 0)) == {*best[:15], *rest}


def test_the_global_view_may_compete() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    in_global = features.layout.role_N == 0
    wanted = replace(features, relevance_BN=in_global.float()[None])
    flat = {"norm": "none", "scaffold": {"size": 0}, "weights": {"neighbour": 0}}
    assert all(in_global[kept(ShirgSelector(budget=60, views="all", **flat)(wanted))])
    assert not any(in_global[kept(ShirgSelector(budget=60, **flat)(wanted))])


def test_tome_merges_the_most_similar_neighbours() -> None:
    layout = single_layout(4, 14, Pooling(side=2))
    x = torch.eye(16)[None].clone()
    x[0, 6] = x[0, 5] + 0.1 * x[0, 6]  # cell (1, 2) resembles (1, 1), which is white and goes there
    features = make_features(layout=layout, sizes=[(640, 640)], tokens=x, relevance=torch.arange(16.0)[None])
    options: dict[str, Any] = {"geometry": "single_672", "scaffold": {"size": 0}, "weights": {"neighbour": 0}}
    chosen = ShirgSelector(budget=15, merge={"mode": "tome", "share": 0.07}, **options)(features)
    assert kept(chosen) == [i for i in range(16) if i not in (5, 6)]
    slot = int((chosen.source_BT[0] == int(Source.MERGED)).nonzero())
    assert slot == 5 and chosen.index_BT[0, slot] == -1
    assert torch.allclose(chosen.tokens_BTD[0, slot], x[0, [5, 6]].mean(0))
    x0, y0, x1, y1 = chosen.box_BT4[0, slot].tolist()
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((0.5, 0.375))
    assert (x1 - x0) * (y1 - y0) == pytest.approx(2 / 16)
