"""Rankings: representatives of regions, diversity, groups that only fill up; and merging before them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from shirg import Pooling, ShirgSelector, Source, layout_tables, regions, single_layout
from shirg.topk import tiered_topk
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


def test_the_global_view_may_compete() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    in_global = features.layout.role_N == 0
    wanted = replace(features, relevance_BN=in_global.float()[None])
    flat = {"norm": "none", "scaffold": {"size": 0}, "weights": {"neighbor": 0}}
    assert all(in_global[kept(ShirgSelector(budget=60, views="all", **flat)(wanted))])
    assert not any(in_global[kept(ShirgSelector(budget=60, **flat)(wanted))])


def test_tome_merges_the_most_similar_neighbours() -> None:
    layout = single_layout(4, 14, Pooling(side=2))
    x = torch.eye(16)[None].clone()
    x[0, 6] = x[0, 5] + 0.1 * x[0, 6]  # cell (1, 2) resembles (1, 1), which is white and goes there
    features = make_features(layout=layout, sizes=[(640, 640)], tokens=x, relevance=torch.arange(16.0)[None])
    options: dict[str, Any] = {"geometry": "single_672", "scaffold": {"size": 0}, "weights": {"neighbor": 0}}
    chosen = ShirgSelector(budget=15, merge={"mode": "tome", "share": 0.07}, **options)(features)
    assert kept(chosen) == [i for i in range(16) if i not in (5, 6)]
    slot = int((chosen.source_BT[0] == int(Source.MERGED)).nonzero())
    assert slot == 5 and chosen.index_BT[0, slot] == -1
    assert torch.allclose(chosen.tokens_BTD[0, slot], x[0, [5, 6]].mean(0))
    x0, y0, x1, y1 = chosen.box_BT4[0, slot].tolist()
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((0.5, 0.375))
    assert (x1 - x0) * (y1 - y0) == pytest.approx(2 / 16)
