"""The variants of the notes: their numbers at true geometry, and each against a plain reading of its definition."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from shirg import (
    Pooling,
    Selection,
    ShirgSelector,
    Source,
    VisionFeatures,
    crops_layout,
    fovea_layout,
    layout_tables,
    regions,
    single_layout,
)
from tests.features import features_for, geometry_layout, make_features, mirror
from tests.shirg import plain

CONF = Path(__file__).resolve().parents[2] / "conf" / "selector"
PUBLISHED = {"shirg": 980, "shirg_div": 980, "shirg_672": 1216, "shirg_v2": 769, "shirg_fixed": 768, "shirg_x": 912}
PUBLISHED |= {"shirg_fovea": 980}


def variant(name: str, **knobs: Any) -> ShirgSelector:
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    drop = ("defaults", "_target_")
    return ShirgSelector(**{**{k: v for k, v in own.items() if k not in drop}, "budget": PUBLISHED[name], **knobs})


def kept(chosen: Selection, sample: int = 0) -> list[int]:
    used = chosen.mask_BT[sample] & (chosen.source_BT[sample] == int(Source.KEPT))
    index: list[int] = chosen.index_BT[sample][used].tolist()
    return index


def counts(chosen: Selection) -> list[int]:
    return torch.bincount(chosen.source_BT[0][chosen.mask_BT[0]], minlength=4).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shirg_div", [916, 64, 0, 0]),
        ("shirg_672", [1152, 64, 0, 0]),
        ("shirg_v2", [768, 0, 1, 0]),
        ("shirg_fixed", [768, 0, 0, 0]),
        ("shirg_x", [768, 144, 0, 0]),
        ("shirg_fovea", [724, 256, 0, 0]),
    ],
)
def test_published_numbers_at_true_geometry(name: str, expected: list[int]) -> None:
    gate = variant(name)
    layout = {"single_672": single_layout(48, 14, Pooling(side=24)), "fovea": fovea_layout(32, 14, Pooling(side=16))}
    features = make_features((2, 2), side=27, sizes=[(768, 768)], width=4, layout=layout.get(gate.geometry))
    assert counts(gate(features)) == expected


def test_the_notes_canvas_holds_2304_cells() -> None:
    layout = crops_layout(48, 27, 14, Pooling(side=14))
    table = layout_tables(layout)
    assert layout.n_tokens == 3645 and len(table.candidate_MC) == 2304 and layout.overlaps
    several = (table.candidate_MC >= 0).sum(-1)
    assert torch.bincount(several).tolist() == [0, 1323, 693, 252, 0, 36]
    # Corner crops begin at pixel 0 and 294, the centre crop at 140, and all end inside the canvas of 672.
    firsts = layout.cell_N2.unflatten(0, (5, 729))[:, 0] * 14
    assert firsts.tolist() == [[0, 0], [0, 294], [294, 0], [294, 294], [140, 140]]
    assert layout.canvas_px == (672, 672) and layout.cell_N2.max() == 47
    for cell, members in enumerate(table.candidate_MC.tolist()):
        for token in members:
            assert token < 0 or layout.cell_N2[token].tolist() == [cell // 48, cell % 48]


def test_a_cell_goes_to_its_most_relevant_token() -> None:
    layout = geometry_layout("seed_canvas48", 6)
    features = make_features(layout=layout, sizes=[(640, 640), (640, 480)], seed=2)
    gate = ShirgSelector(budget=60, geometry="seed_canvas48", scaffold={"size": 0})
    chosen = gate(features)
    cell_N = layout.cell_N2 @ torch.tensor([layout.canvas[1], 1])
    assert features.relevance_BN is not None
    for sample in range(2):
        index = kept(chosen, sample)
        assert len({int(cell_N[i]) for i in index}) == 60, "no cell twice"
        for i in index:
            rivals = (cell_N == cell_N[i]).nonzero().flatten()
            assert features.relevance_BN[sample, i] == features.relevance_BN[sample, rivals].max()


def test_equal_relevance_goes_to_the_token_deepest_in_its_crop_then_to_the_first_crop() -> None:
    layout = geometry_layout("seed_canvas48", 6)  # ten cells: crops begin at 0, 4 and, in the middle, 2
    features = make_features(layout=layout, sizes=[(640, 640)])
    flat = replace(features, relevance_BN=torch.zeros(1, layout.n_tokens))
    weights = {"similarity": 1.0, "neighbor": 0.3}
    index = kept(ShirgSelector(budget=100, geometry="seed_canvas48", weights=weights, scaffold={"size": 0})(flat))
    view_of = {tuple(layout.cell_N2[i].tolist()): int(layout.view_N[i]) for i in index}
    assert view_of[(0, 0)] == 0 and view_of[(0, 9)] == 1 and view_of[(9, 0)] == 2 and view_of[(9, 9)] == 3
    assert view_of[(4, 4)] == 4, "two cells inside the centre crop, on the border of the others"
    assert view_of[(0, 4)] == 0, "on the border of both: the first crop"
    assert (
        ShirgSelector(budget=100, geometry="seed_canvas48", dedup="border", scaffold={"size": 0})(features)
        .index_BT[0]
        .tolist()
        == index
    )


def test_who_stands_back_gets_no_gradient() -> None:
    features = make_features(layout=geometry_layout("seed_canvas48", 6), sizes=[(640, 640)], seed=2)
    x = features.tokens_BND.clone().requires_grad_()
    gate = ShirgSelector(budget=64, geometry="seed_canvas48", scaffold={"size": 2, "source": "canvas"})
    (grad,) = torch.autograd.grad(gate(replace(features, tokens_BND=x)).tokens_BTD.sum(), x)
    layout, r = features.layout, features.relevance_BN
    assert r is not None
    reached = set(grad[0].abs().sum(-1).nonzero().flatten().tolist())
    cell_N = layout.cell_N2 @ torch.tensor([layout.canvas[1], 1])
    winners = {max((cell_N == c).nonzero().flatten().tolist(), key=lambda i: float(r[0, i])) for c in cell_N.unique()}
    assert reached == winners, "the scaffold reaches one token of each cell, and nothing the others"


def test_means_of_cells() -> None:
    layout = geometry_layout("seed_canvas48", 6)
    features = make_features(layout=layout, sizes=[(640, 640)])
    knobs: dict[str, Any] = {"geometry": "seed_canvas48", "dedup": "mean", "underflow": "mask", "scaffold": {"size": 0}}
    chosen = ShirgSelector(budget=100, **knobs)(features)
    for slot in range(100):
        cell = torch.tensor([slot // 10, slot % 10])
        members = (layout.cell_N2 == cell).all(-1).nonzero().flatten()
        assert torch.allclose(chosen.tokens_BTD[0, slot], features.tokens_BND[0, members].mean(0), atol=1e-6)
        assert chosen.source_BT[0, slot] == (Source.KEPT if len(members) == 1 else Source.MERGED)


def test_doubles_fill_up_last() -> None:
    layout = geometry_layout("seed_canvas48", 6)
    features = make_features(layout=layout, sizes=[(1000, 300)])
    gate = ShirgSelector(budget=40, geometry="seed_canvas48", scaffold={"size": 0})
    cells = layout.cell_N2[kept(gate(features))]
    distinct = len({tuple(c) for c in layout.cell_N2[features.valid_BN[0]].tolist()})
    assert distinct < 40 and len(cells) == 40 and len({tuple(c) for c in cells.tolist()}) == distinct


def z(values: Tensor, members: list[int], groups: Tensor) -> dict[int, float]:
    found: dict[int, float] = {}
    for name in groups.unique().tolist():
        found |= plain.zscore(values.tolist(), [i for i in members if groups[i] == name])
    return found


def edges(features: VisionFeatures, sample: int) -> Tensor:
    """The edge term token by token, each view by itself."""
    layout, x = features.layout, torch.nn.functional.normalize(features.tokens_BND[sample].double(), dim=-1)
    at = {(int(v), *c): i for i, (v, c) in enumerate(zip(layout.view_N, layout.cell_N2.tolist(), strict=True))}
    valid = features.valid_BN[sample]
    values = []
    for i, (view, (row, col)) in enumerate(zip(layout.view_N.tolist(), layout.cell_N2.tolist(), strict=True)):
        total = torch.zeros_like(x[0])
        for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            j = at.get((view, row + step[0], col + step[1]))
            if j is not None and valid[i] and valid[j]:
                total += x[i] - x[j]
        values.append(total.abs().mean())
    return torch.stack(values)


def with_representatives(score: dict[int, float], groups: list[list[int]], k: int, rank: list[int]) -> list[int]:
    first = [
        min((i for i in g if i in score), key=lambda i: (-score[i], rank[i])) for g in groups if set(g) & set(score)
    ]
    rest = sorted((i for i in score if i not in first), key=lambda i: (-score[i], rank[i]))
    return sorted(first + rest[: k - len(first)], key=lambda i: rank[i])


@pytest.mark.parametrize("name", ["shirg_v2", "shirg_fixed", "shirg_x", "shirg_672"])
def test_equals_the_plain_reading(name: str) -> None:
    features = features_for(variant(name), side=6, sizes=[(640, 480), (768, 768)], width=8, seed=4)
    if name != "shirg_v2":
        features = make_features(layout=geometry_layout("single_672", 6), sizes=[(640, 480)], width=8, seed=4)
    layout, x = features.layout, features.tokens_BND[0].double()
    assert features.relevance_BN is not None
    members = features.valid_BN[0].nonzero().flatten().tolist()
    by = layout.view_N
    r = z(features.relevance_BN[0], members, by)
    variance = z(x.var(-1, unbiased=False), members, by)
    offset = (layout.centre_N2 - 0.5).norm(dim=-1) * 2**0.5
    p = z(offset, members, by)
    d = z(torch.tensor(plain.distance(features, 0, "feature_l2")), members, by)
    e = z(edges(features, 0), members, by)
    score = {
        "shirg_v2": {i: 0.75 * r[i] + 0.25 * variance[i] + 0.15 * e[i] for i in members},
        "shirg_fixed": {i: 0.7 * r[i] + 0.3 * variance[i] for i in members},
    }.get(name, {i: 0.7 * r[i] - 0.2 * d[i] - 0.1 * p[i] for i in members})
    local = layout.cell_N2 % layout.side // 4
    key = (by * 100 + local[:, 0] * 10 + local[:, 1]).tolist()
    groups = [[i for i in range(len(key)) if key[i] == name] for name in sorted(set(key))]
    groups = [] if name == "shirg_672" else groups
    gate = variant(name, budget=50)
    chosen = gate(features)
    assert kept(chosen) == with_representatives(score, groups, len(kept(chosen)), layout.rank_N.tolist())


@pytest.mark.parametrize("name", ["shirg_v2", "shirg_fixed", "shirg_x"])
@pytest.mark.parametrize("seed", range(5))
def test_every_region_keeps_a_token(name: str, seed: int) -> None:
    gate = variant(name, budget=80)
    features = features_for(gate, sizes=[(640, 480), (1000, 300)], seed=seed)
    rows = regions(features.layout, 4, 0)
    if name == "shirg_v2":
        assert len(rows) == 5 * 9
    places = layout_tables(features.layout).place_N
    chosen = gate(features)
    for sample in range(2):
        taken = set(places[kept(chosen, sample)].tolist())
        usable = set(places[features.valid_BN[sample]].tolist())
        for region in rows.tolist():
            assert not usable & set(region) or taken & set(region)


def test_regions_partition_the_places() -> None:
    for layout, cells, count in (
        (single_layout(48, 14, Pooling(side=24)), 4, 144),
        (make_features((2, 2), side=27, sizes=[(768, 768)], width=1).layout, 4, 245),
        (crops_layout(48, 27, 14, Pooling(side=14)), 4, 144),
    ):
        rows = regions(layout, cells, 0)
        n_places = len(layout_tables(layout).centre_P2)
        members = rows[rows < n_places]
        assert len(rows) == count and sorted(members.tolist()) == list(range(n_places))


def test_more_regions_than_tokens_is_refused() -> None:
    gate = ShirgSelector(budget=30, coverage=2)
    with pytest.raises(ValueError, match=r"has 100 regions to cover, but only 5 tokens are kept"):
        gate(make_features((2, 2)))


def test_the_summary_is_the_mean_of_what_was_left() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    chosen = ShirgSelector(budget=61, scaffold={"size": 0}, summary=True)(features)
    left = features.valid_BN[0].clone()
    left[kept(chosen)] = False
    assert chosen.source_BT[0, -1] == Source.SUMMARY and chosen.index_BT[0, -1] == -1
    assert torch.allclose(chosen.tokens_BTD[0, -1], features.tokens_BND[0, left].mean(0), atol=1e-6)
    everything = ShirgSelector(budget=features.n_valid[0] + 1, scaffold={"size": 0}, summary=True)(features)
    assert torch.allclose(everything.tokens_BTD[0, -1], features.tokens_BND[0, features.valid_BN[0]].mean(0), atol=1e-6)


@pytest.mark.parametrize("geometry", ["single_672", "fovea"])
def test_mirrored_features_give_mirrored_cells(geometry: Any) -> None:
    weights = {"centre": 0.2, "variance": 0.3, "edge": 0.2}
    source = "canvas" if geometry == "single_672" else "global"
    gate = ShirgSelector(budget=60, geometry=geometry, weights=weights, scaffold={"size": 2, "source": source})
    features = make_features(layout=geometry_layout(geometry, 8), sizes=[(640, 640)])
    last = features.layout.canvas[1] - 1
    here = {tuple(features.layout.cell_N2[i].tolist()) for i in kept(gate(features))}
    there = {tuple(features.layout.cell_N2[i].tolist()) for i in kept(gate(mirror(features)))}
    assert {(r, last - c) for r, c in here} == there


def test_tome_merges_the_most_similar_neighbours() -> None:
    layout = single_layout(4, 14, Pooling(side=2))
    x = torch.eye(16)[None].clone()
    x[0, 6] = x[0, 5] + 0.1 * x[0, 6]  # cell (1, 2) resembles (1, 1), which is white and goes there
    features = make_features(layout=layout, sizes=[(640, 640)], tokens=x, relevance=torch.arange(16.0)[None])
    knobs: dict[str, Any] = {"geometry": "single_672", "scaffold": {"size": 0}, "weights": {"neighbor": 0}}
    chosen = ShirgSelector(budget=15, merge={"mode": "tome", "share": 0.07}, **knobs)(features)
    assert kept(chosen) == [i for i in range(16) if i not in (5, 6)]
    slot = int((chosen.source_BT[0] == int(Source.MERGED)).nonzero())
    assert slot == 5 and chosen.index_BT[0, slot] == -1
    assert torch.allclose(chosen.tokens_BTD[0, slot], x[0, [5, 6]].mean(0))
    x0, y0, x1, y1 = chosen.box_BT4[0, slot].tolist()
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((0.5, 0.375))
    assert (x1 - x0) * (y1 - y0) == pytest.approx(2 / 16)


def test_diversity_picks_one_by_one() -> None:
    features = make_features((2, 2), side=5, sizes=[(768, 768)])
    gate = ShirgSelector(budget=12, diversity={"mode": "mmr", "weight": 0.7}, scaffold={"size": 0})
    scores = gate.score(features)[0].double()
    x = torch.nn.functional.normalize(features.tokens_BND[0].double(), dim=-1)
    tiles = (features.layout.role_N == 1).nonzero().flatten().tolist()
    picked: list[int] = []
    for _ in range(12):
        worth = {i: scores[i] - (0.7 * (x[i] @ x[picked].T).max() if picked else 0) for i in tiles if i not in picked}
        picked.append(max(worth, key=lambda i: float(worth[i])))
    assert kept(gate(features)) == sorted(picked, key=lambda i: int(features.layout.rank_N[i]))
    assert kept(gate(features)) != kept(ShirgSelector(budget=12, scaffold={"size": 0})(features))


def test_entropy_decides_how_many() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    n = features.layout.n_tokens
    peaked, flat = torch.zeros(1, n), torch.linspace(0, 1, n)[None].clone()
    peaked[0, 100:103] = 1
    knobs: dict[str, Any] = {"scaffold": {"size": 0}, "weights": {"neighbor": 0}}
    gate = ShirgSelector(budget=100, adaptive={"mode": "entropy", "temperature": 0.3}, **knobs)
    few, many = (gate(replace(features, relevance_BN=r)) for r in (peaked, flat))
    assert gate.may_use_less and few.mask_BT.shape == many.mask_BT.shape == (1, 100)
    assert (int(few.mask_BT.sum()), int(many.mask_BT.sum())) == (50, 100)
    assert {100, 101, 102} <= set(kept(few)) and set(kept(few)) <= set(
        kept(ShirgSelector(budget=100, **knobs)(replace(features, relevance_BN=peaked)))
    )


def test_the_global_view_may_compete() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    in_global = features.layout.role_N == 0
    wanted = replace(features, relevance_BN=in_global.float()[None], taps=features.taps)
    flat = {"norm": "none", "scaffold": {"size": 0}, "weights": {"neighbor": 0}}
    assert all(in_global[kept(ShirgSelector(budget=60, views="all", **flat)(wanted))])
    assert not any(in_global[kept(ShirgSelector(budget=60, **flat)(wanted))])


def test_a_selector_refuses_another_geometry() -> None:
    with pytest.raises(ValueError, match="is for geometry=fovea, the features are of lavida_tiles"):
        ShirgSelector(budget=60, geometry="fovea")(make_features((2, 2)))
    features = make_features(layout=geometry_layout("fovea"))
    with pytest.raises(ValueError, match="needs VisionFeatures.base_count_B"):
        ShirgSelector(budget="matched", geometry="fovea")(replace(features, base_count_B=None))


def test_crops_must_overlap_and_cover() -> None:
    with pytest.raises(ValueError, match="cannot overlap and cover a canvas of 3 x 3"):
        crops_layout(3, 1, 14, Pooling(side=1))
