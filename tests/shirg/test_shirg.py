"""The SHIRG selector: it equals the plain reading of its definition, for SHIRG-980 and for each variant."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiments.bench.reference import naive_shirg980
from shirg import (
    Pooling,
    Selection,
    ShirgSelector,
    Source,
    UserError,
    VisionFeatures,
    fovea_layout,
    pooled_count_B,
    single_layout,
)
from tests.cases import variant
from tests.features import (
    GRIDS,
    PADDED,
    SIZES,
    features_for,
    geometry_layout,
    layout_of,
    make_features,
    mirror,
    projector,
)
from tests.reference import best_tokens, distances, edges, kept, zscore_by_view

SMALL = {"scaffold": {"size": 3}}


def counts(chosen: Selection) -> list[int]:
    """How many tokens of the first picture have each source."""
    return torch.bincount(chosen.source_BT[0][chosen.mask_BT[0]], minlength=4).tolist()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("grid", [*GRIDS, PADDED])
def test_equals_the_plain_reading(grid: tuple[int, int], sign: int) -> None:
    features = make_features(grid, side=7, sizes=SIZES[grid], seed=3, width=8)
    chosen = ShirgSelector(budget=39, neighbour={"sign": sign}, **SMALL)(features)
    for sample in range(3):
        tokens, index = naive_shirg980(features, sample, 39, scaffold=3, sign=sign)
        assert kept(chosen, sample) == index == chosen.index_BT[sample, 9:].tolist()
        assert torch.allclose(tokens, chosen.tokens_BTD[sample], atol=1e-5)


@pytest.mark.parametrize("name", ["shirg_v2", "shirg_fixed", "shirg_x", "shirg_672"])
def test_variants_equal_the_plain_reading(name: str) -> None:
    selector = variant(name, budget=50)
    tiles = make_features((2, 2), side=6, sizes=[(640, 480), (768, 768)], width=8, seed=4)
    single = make_features(layout=geometry_layout("single_672", 6), sizes=[(640, 480)], width=8, seed=4)
    features = tiles if name == "shirg_v2" else single
    layout, x = features.layout, features.tokens_BND[0].double()
    members = features.valid_BN[0].nonzero().flatten().tolist()

    def z(values: list[float]) -> dict[int, float]:
        return zscore_by_view({i: values[i] for i in members}, layout.view_N)

    r = z(features.relevance_BN[0].tolist())
    variance = z(x.var(-1, unbiased=False).tolist())
    centre = z(((layout.centre_N2 - 0.5).norm(dim=-1) * 2**0.5).tolist())
    d = zscore_by_view(distances(features, 0, "feature_l2"), layout.view_N)
    e = z(edges(features, 0))
    score = {
        "shirg_v2": {i: 0.75 * r[i] + 0.25 * variance[i] + 0.15 * e[i] for i in members},
        "shirg_fixed": {i: 0.7 * r[i] + 0.3 * variance[i] for i in members},
    }.get(name, {i: 0.7 * r[i] - 0.2 * d[i] - 0.1 * centre[i] for i in members})
    index = kept(selector(features))
    every = [score.get(i, 0.0) for i in range(layout.n_tokens)]
    assert index == sorted(
        best_tokens(selector, features, every, 0, len(index)), key=layout.rank_N.tolist().__getitem__
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shirg", [916, 64, 0, 0]),
        ("shirg_div", [916, 64, 0, 0]),
        ("shirg_672", [1152, 64, 0, 0]),
        ("shirg_v2", [768, 0, 1, 0]),
        ("shirg_fixed", [768, 0, 0, 0]),
        ("shirg_x", [768, 144, 0, 0]),
        ("shirg_fovea", [724, 256, 0, 0]),
    ],
)
def test_published_numbers_at_true_geometry(name: str, expected: list[int]) -> None:
    selector = variant(name)
    layout = {"single_672": single_layout(48, 14, Pooling(side=24)), "fovea": fovea_layout(32, 14, Pooling(side=16))}
    features = make_features((2, 2), side=27, sizes=[(768, 768)], width=4, layout=layout.get(selector.geometry))
    chosen = selector(features)
    assert counts(chosen) == expected
    if name == "shirg":
        assert chosen.source_BT[0].tolist() == [int(Source.SCAFFOLD)] * 64 + [int(Source.KEPT)] * 916
        assert all(features.layout.role_N[i] == 1 for i in kept(chosen))


def test_matched_budget_is_the_base_models_count() -> None:
    features = make_features((2, 2), side=27, sizes=SIZES[(2, 2)], width=4)
    counts = pooled_count_B(features.layout, features.size_B2).tolist()
    assert counts == [1008, 834, 784]
    for newline in ("none", "row"):
        chosen = ShirgSelector(budget="matched", newline=newline)(features)
        assert chosen.mask_BT.sum(-1).tolist() == counts
        assert int((chosen.source_BT == int(Source.SCAFFOLD)).sum()) == 3 * 64
    # Room for the largest picture of the canvas, whichever pictures there are.
    assert ShirgSelector(budget="matched")(features[1:]).mask_BT.shape == (2, 1008)


THIN = [(640, 480), (128, 20), (20, 128), (128, 8), (8, 128), (1, 1000)]
MADE: dict[str, Any] = {
    "lavida_tiles": {"scaffold": {"size": 4}},
    "fovea": {"scaffold": {"size": "1/2"}},
    "single_672": {"scaffold": {"source": "canvas"}},
    "seed_canvas48": {"scaffold": {"size": 5, "source": "canvas"}},
}
DO_NOT_FIT = {
    ("lavida_tiles", "row"): [(8, 128)],
    ("single_672", "none"): THIN[1:],
    ("single_672", "row"): THIN[1:],
    ("seed_canvas48", "row"): THIN[3:],
}
"""Pictures whose scaffold and newlines are more than LaViDa uses for them."""


@pytest.mark.parametrize("newline", ["none", "row"])
@pytest.mark.parametrize("geometry", MADE)
@pytest.mark.parametrize("size", THIN, ids=str)
def test_a_matched_budget_is_never_exceeded(geometry: Any, newline: str, size: tuple[int, int]) -> None:
    """It is LaViDa's own on every geometry; where what is made in any case does not fit, the picture is refused."""
    selector = ShirgSelector(budget="matched", geometry=geometry, newline=newline, **MADE[geometry])
    features = features_for(selector, (2, 2), sizes=[(768, 768), size])
    assert features.counts is not None
    matched, rows = features.counts[1].base, features.counts[1].rows
    assert matched == int(pooled_count_B(layout_of((2, 2)), torch.tensor([size])))
    made = selector.options.scaffold.side(features.layout) ** 2 + rows * (newline == "row")
    assert (made > matched) == (size in DO_NOT_FIT.get((geometry, newline), ()))
    if made > matched:
        with pytest.raises(UserError, match=f"{made} tokens, but budget=matched is {matched} for picture 'picture-1'"):
            selector(features)
        return
    chosen = selector(features)
    used = chosen.mask_BT[1]
    is_made = (chosen.source_BT[1] != int(Source.KEPT)) & used
    assert int(used.sum()) <= matched and int(is_made.sum()) <= made
    # Less only where the padding takes windows of the scaffold, or the picture has not as many tokens.
    all_kept = matched - made if geometry != "seed_canvas48" else min(matched - made, features.n_valid[1])
    assert int((used & ~is_made).sum()) == all_kept


@pytest.mark.parametrize(("size", "least"), [(5, None), (6, "25"), ("1/1", "25")])
def test_the_least_count_is_that_of_the_base_model(size: Any, least: str | None) -> None:
    """Where nothing is known on the host: LaViDa's own least, 5 x 5 tokens, whatever the geometry pools to."""
    features = replace(make_features(layout=geometry_layout("fovea"), sizes=[(640, 480)]), counts=None)
    selector = ShirgSelector(budget="matched", geometry="fovea", scaffold={"size": size})
    if least is None:
        assert counts(selector(features))[:2] == [113 - 25, 25]
        return
    with pytest.raises(UserError, match=f"budget=matched can be as small as {least} for picture 'picture-0'"):
        selector(features)


def test_underflow() -> None:
    features = make_features((2, 2), sizes=[(3000, 300), (768, 768)])
    tiles = features.n_valid[0] - 81
    assert tiles == 36, "a strip of two rows"
    filled = ShirgSelector(budget=69, **SMALL)(features)
    index = kept(filled)
    assert len(index) == 60 and bool(filled.mask_BT.all())
    assert sum(int(features.layout.role_N[i]) for i in index) == tiles, "every tile token first"
    assert filled.scores_BN is not None
    of_global = filled.scores_BN[0, :81].sort(descending=True).indices[: 60 - tiles].tolist()
    assert {i for i in index if i < 81} == set(of_global)
    assert index == sorted(index, key=lambda i: int(features.layout.rank_N[i]))

    masked = ShirgSelector(budget=69, underflow="mask", **SMALL)(features)
    assert masked.mask_BT.sum(-1).tolist() == [9 + tiles, 69]
    assert kept(masked) == [i for i in index if i >= 81]
    assert kept(masked, 1) == kept(filled, 1)


def test_relevance_decides() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    row, col = features.layout.cell_N2.unbind(-1)
    is_tile = features.layout.role_N == 1
    wanted = []
    for top, left in ((2, 3), (10, 7)):
        box = is_tile & (row >= top) & (row < top + 5) & (col >= left) & (col < left + 5)
        chosen = ShirgSelector(budget=69, **SMALL)(replace(features, relevance_BN=box.float()[None]))
        assert set(box.nonzero().flatten().tolist()) <= set(kept(chosen))
        wanted.append(kept(chosen))
    assert wanted[0] != wanted[1]


@settings(max_examples=25, deadline=None)
@given(token=st.integers(0, 323), by=st.floats(0.01, 5), norm=st.sampled_from(["none", "rank"]))
def test_more_relevance_never_evicts(token: int, by: float, norm: str) -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    selector = ShirgSelector(budget=69, norm=norm, **SMALL)
    raised = features.relevance_BN.clone()
    raised[0, 81 + token] += by
    before, after = kept(selector(features)), kept(selector(replace(features, relevance_BN=raised)))
    assert 81 + token in after or 81 + token not in before


@pytest.mark.parametrize("norm", ["zscore", "minmax", "rank", "none"])
def test_a_constant_in_the_relevance_changes_nothing(norm: str) -> None:
    features = make_features((2, 2))
    # Sixteenths, so that the sum is exact.
    dyadic = (features.relevance_BN * 16).round() / 16
    selector = ShirgSelector(budget=69, norm=norm, **SMALL)
    here = selector(replace(features, relevance_BN=dyadic))
    there = selector(replace(features, relevance_BN=dyadic + 2))
    tiles = features.layout.role_N == 1
    before, after = here.scores_BN[:, tiles], there.scores_BN[:, tiles]
    assert torch.allclose(before - before.mean(), after - after.mean(), atol=1e-5)
    for sample in range(2):
        assert len(set(kept(here, sample)) ^ set(kept(there, sample))) <= 2


@pytest.mark.parametrize("geometry", ["single_672", "fovea"])
def test_mirrored_features_give_mirrored_cells(geometry: Any) -> None:
    weights = {"centre": 0.2, "variance": 0.3, "edge": 0.2}
    source = "canvas" if geometry == "single_672" else "global"
    scaffold = {"size": 2, "source": source}
    selector = ShirgSelector(budget=60, geometry=geometry, weights=weights, scaffold=scaffold)
    assert_mirrored(selector, make_features(layout=geometry_layout(geometry, 8), sizes=[(640, 640)]))


@pytest.mark.parametrize("grid", GRIDS[:5])
def test_mirrored_tiles_give_mirrored_cells(grid: tuple[int, int]) -> None:
    features = make_features(grid, sizes=SIZES[grid][1:])
    n = features.layout.n_tokens
    everything = replace(features, valid_BN=torch.ones_like(features.valid_BN), n_valid=(n, n))
    assert_mirrored(ShirgSelector(budget=69, crop_term="border", **SMALL), everything)


def assert_mirrored(selector: ShirgSelector, features: VisionFeatures) -> None:
    cell_N, last = features.layout.cell_N2.tolist(), features.layout.canvas[1] - 1
    straight, flipped = selector(features), selector(mirror(features))
    for sample in range(len(features.ids)):
        here, there = ({tuple(cell_N[i]) for i in kept(chosen, sample)} for chosen in (straight, flipped))
        assert {(row, last - col) for row, col in here} == there


def test_gradient_reaches_kept_and_scaffold_and_nothing_else() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    x, r = features.tokens_BND.clone().requires_grad_(), features.relevance_BN.clone().requires_grad_()
    chosen = ShirgSelector(budget=69, **SMALL)(replace(features, tokens_BND=x, relevance_BN=r))
    is_kept = chosen.source_BT == int(Source.KEPT)
    (of_kept,) = torch.autograd.grad(chosen.tokens_BTD[is_kept].sum(), x, retain_graph=True)
    assert of_kept[0].abs().sum(-1).nonzero().flatten().tolist() == sorted(kept(chosen))
    assert of_kept[0].abs().max() == 1
    (of_scaffold,) = torch.autograd.grad(chosen.tokens_BTD[~is_kept].sum(), x, retain_graph=True)
    assert of_scaffold[0].abs().sum(-1).nonzero().flatten().tolist() == list(range(81))
    assert torch.autograd.grad(chosen.tokens_BTD.sum(), r, allow_unused=True) == (None,)
    assert chosen.scores_BN is not None and not chosen.scores_BN.requires_grad


def test_averaging_does_not_commute_with_projecting() -> None:
    features, project = make_features((2, 2)), projector()
    before = ShirgSelector(budget=69, **SMALL)
    after = ShirgSelector(budget=69, scaffold={"size": 3, "space": "post"})
    assert (before.stage, after.stage, after.needs) == ("pre", "post", frozenset({"encoder"}))
    early = before(features)
    late = after(replace(features, tokens_BND=project(features.tokens_BND)))
    assert torch.equal(early.index_BT, late.index_BT)
    is_kept = early.source_BT == int(Source.KEPT)
    projected = project(early.tokens_BTD)
    assert torch.allclose(projected[is_kept], late.tokens_BTD[is_kept], atol=1e-6)
    assert not torch.allclose(projected[~is_kept], late.tokens_BTD[~is_kept], atol=1e-3)


def test_bfloat16_keeps_nearly_the_same() -> None:
    features = make_features((2, 2), side=27, sizes=[(768, 768), (640, 480)], width=64)
    half = replace(features, tokens_BND=features.tokens_BND.bfloat16())
    selector = ShirgSelector(budget=980)
    for sample in range(2):
        assert len(set(kept(selector(features), sample)) & set(kept(selector(half), sample))) >= 0.98 * 916


def test_values_that_are_not_finite_raise() -> None:
    features = make_features((2, 2))
    for value in (float("nan"), float("inf"), 1e30):
        tokens = features.tokens_BND.clone()
        tokens[1, 200] = value
        with pytest.raises(RuntimeError, match="not finite"):
            ShirgSelector(budget=69, **SMALL)(replace(features, tokens_BND=tokens))


def test_padding_may_be_kept_in_the_literal_reading() -> None:
    features = make_features((2, 2), sizes=[(3000, 150)])
    relevance: Tensor = (~features.valid_BN).float()
    literal = ShirgSelector(budget=69, mask_padding=False, **SMALL)(replace(features, relevance_BN=relevance))
    assert not bool(features.valid_BN[0, kept(literal)].any())
    assert all(features.layout.role_N[i] == 1 for i in kept(literal))
