"""SHIRG-980: what it keeps, equals the plain reading of its definition and holds its promises."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shirg import Selection, ShirgSelector, Source, VisionFeatures, pooled_count_B
from shirg.options import Adaptive, Diversity, Merging, Neighbor, Scaffold, Weights
from tests.features import GRIDS, SIZES, differs, layout_of, make_features, mirror, projector, through
from tests.shirg import plain

SMALL = {"scaffold": {"size": 3}}


def kept(chosen: Selection, sample: int = 0) -> list[int]:
    used = chosen.mask_BT[sample] & (chosen.source_BT[sample] == int(Source.KEPT))
    index: list[int] = chosen.index_BT[sample][used].tolist()
    return index


def cells(features: VisionFeatures, index: list[int]) -> set[tuple[int, ...]]:
    return {tuple(features.layout.cell_N2[i].tolist()) for i in index}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_plain_reading(grid: tuple[int, int], sign: int) -> None:
    features = make_features(grid, side=6, sizes=SIZES[grid][:2], seed=3, width=8)
    gate = ShirgSelector(budget=29, neighbor={"sign": sign}, **SMALL)
    for sample in range(2):
        assert kept(gate(features), sample) == plain.shirg980(features, sample, 20, sign)


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_statistics_of_each_view(grid: tuple[int, int]) -> None:
    features = make_features(grid, side=5, sizes=SIZES[grid][1:2], seed=5)
    assert features.relevance_BN is not None
    scores = ShirgSelector(budget=50, norm_scope="view", weights={"neighbor": 0}).score(features)
    for view in range(features.layout.n_views):
        in_view = (features.layout.view_N == view) & features.valid_BN[0]
        members = in_view.nonzero().flatten().tolist()
        z = plain.zscore(features.relevance_BN[0].tolist(), members)
        assert [z[i] * 0.65 for i in members] == pytest.approx(scores[0, members].tolist(), abs=1e-5)


def test_published_numbers_at_true_geometry() -> None:
    features = make_features((2, 2), side=27, sizes=[(2480, 3508)], width=8)
    chosen = ShirgSelector(budget=980)(features)
    assert chosen.tokens_BTD.shape == (1, 980, 8) and bool(chosen.mask_BT.all())
    assert chosen.source_BT[0].tolist() == [int(Source.SCAFFOLD)] * 64 + [int(Source.KEPT)] * 916
    assert all(features.layout.role_N[i] == 1 for i in kept(chosen))


def test_the_scaffold_follows_the_base_models_pooled_side() -> None:
    coarse = make_features((2, 2), side=8, sizes=[(768, 768)])
    assert int((ShirgSelector(budget=80)(coarse).source_BT == int(Source.SCAFFOLD)).sum()) == 16


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["zero", "equal", "one hot", "huge", "tiny", "random"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    grid=st.sampled_from(GRIDS),
    k=st.integers(1, 60),
)
def test_the_budget_is_exact_whatever_the_content(kind: str, dtype: torch.dtype, grid: tuple[int, int], k: int) -> None:
    layout = layout_of(grid, side=8)
    shape = (2, layout.n_tokens, 6)
    tokens = {
        "zero": torch.zeros(shape),
        "equal": torch.full(shape, 0.3),
        "one hot": torch.nn.functional.one_hot(torch.arange(2 * layout.n_tokens) % 6).view(shape).float(),
        "huge": 6e4 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1),
        "tiny": 1e-7 * torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        "random": torch.randn(shape, generator=torch.Generator().manual_seed(2)),
    }[kind]
    features = make_features(grid, side=8, sizes=SIZES[grid][:2], layout=layout, tokens=tokens, dtype=dtype)
    if kind in ("zero", "equal"):
        features = replace(features, relevance_BN=torch.zeros(2, layout.n_tokens))
    chosen = ShirgSelector(budget=k + 4, scaffold={"size": 2})(features)
    assert chosen.mask_BT.shape == (2, k + 4) and bool(chosen.mask_BT.all())
    assert chosen.tokens_BTD.dtype == dtype
    for sample in range(2):
        index = kept(chosen, sample)
        assert len(set(index)) == k and bool(features.valid_BN[sample, index].all())


def test_the_best_are_kept() -> None:
    features = make_features((2, 2), sizes=SIZES[(2, 2)])
    chosen = ShirgSelector(budget=69, **SMALL)(features)
    assert chosen.scores_BN is not None
    for sample in range(3):
        index = set(kept(chosen, sample))
        tile = (features.layout.role_N == 1) & features.valid_BN[sample]
        left = [i for i in tile.nonzero().flatten().tolist() if i not in index]
        assert chosen.scores_BN[sample, list(index)].min() >= chosen.scores_BN[sample, left].max()


def test_equal_scores_go_to_the_first_in_reading_order() -> None:
    layout = layout_of((2, 2), side=4)
    same = torch.ones(1, layout.n_tokens, 3)
    features = make_features(layout=layout, sizes=[(768, 768)], tokens=same, relevance=torch.zeros(1, layout.n_tokens))
    assert kept(ShirgSelector(budget=11, scaffold={"size": 1})(features)) == layout.order_N[16:26].tolist()


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


def test_newlines_come_on_top_of_a_budget_in_numbers() -> None:
    features = make_features((2, 2), sizes=[(768, 768), (768, 300)])
    chosen = ShirgSelector(budget=69, newline="row", **SMALL)(features)
    assert chosen.mask_BT.shape[1] == 69 + 18
    assert (chosen.mask_BT & (chosen.source_BT == int(Source.NEWLINE))).sum(-1).tolist() == [18, 7]
    plain_rows = ShirgSelector(budget=69, **SMALL)(features)
    assert [kept(chosen, s) for s in range(2)] == [kept(plain_rows, s) for s in range(2)]


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
    with pytest.raises(ValueError, match=rf"picture 'picture-0' has {tiles} tile tokens.*underflow=global"):
        ShirgSelector(budget=69, underflow="raise", **SMALL)(features)
    with pytest.raises(ValueError, match=r"asks for 191 tokens, but picture 'picture-0' has .*underflow=mask"):
        ShirgSelector(budget=200, **SMALL)(features)
    with pytest.raises(ValueError, match=r"has 405 tokens"):
        ShirgSelector(budget=500, underflow="mask", **SMALL)(features)


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


def test_relevance_is_required() -> None:
    with pytest.raises(ValueError, match="choose relevance="):
        ShirgSelector(budget=69)(replace(make_features(), relevance_BN=None))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(token=st.integers(0, 323), by=st.floats(0.01, 5), norm=st.sampled_from(["none", "rank"]))
def test_more_relevance_never_evicts(token: int, by: float, norm: str) -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    gate = ShirgSelector(budget=69, norm=norm, **SMALL)
    raised = features.relevance_BN.clone()
    raised[0, 81 + token] += by
    before, after = kept(gate(features)), kept(gate(replace(features, relevance_BN=raised)))
    assert 81 + token in after or 81 + token not in before


@pytest.mark.parametrize("norm", ["zscore", "minmax", "rank", "none"])
def test_a_constant_in_the_relevance_changes_nothing(norm: str) -> None:
    features = make_features((2, 2))
    # Sixteenths, so that the sum is exact.
    dyadic = (features.relevance_BN * 16).round() / 16
    gate = ShirgSelector(budget=69, norm=norm, **SMALL)
    here = gate(replace(features, relevance_BN=dyadic))
    there = gate(replace(features, relevance_BN=dyadic + 2))
    tiles = features.layout.role_N == 1
    before, after = here.scores_BN[:, tiles], there.scores_BN[:, tiles]
    assert torch.allclose(before - before.mean(), after - after.mean(), atol=1e-5)
    for sample in range(2):
        assert len(set(kept(here, sample)) ^ set(kept(there, sample))) <= 2


@pytest.mark.parametrize("grid", GRIDS[:5])
def test_mirrored_features_give_mirrored_cells(grid: tuple[int, int]) -> None:
    features = make_features(grid, sizes=SIZES[grid][1:])
    flipped = mirror(
        replace(features, valid_BN=torch.ones_like(features.valid_BN), n_valid=(features.layout.n_tokens,) * 2)
    )
    straight = replace(features, valid_BN=flipped.valid_BN, n_valid=flipped.n_valid)
    gate = ShirgSelector(budget=69, crop_term="border", **SMALL)
    last = features.layout.canvas[1] - 1
    for sample in range(2):
        here = cells(features, kept(gate(straight), sample))
        assert {(r, last - c) for r, c in here} == cells(features, kept(gate(flipped), sample))


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


def test_choosing_commutes_with_projecting_and_averaging_does_not() -> None:
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
    with pytest.raises(ValueError, match=r"needs the taps \['encoder'\]"):
        after(replace(features, taps={}))


def test_bfloat16_keeps_nearly_the_same() -> None:
    features = make_features((2, 2), side=27, sizes=[(768, 768), (640, 480)], width=64)
    half = replace(features, tokens_BND=features.tokens_BND.bfloat16())
    gate = ShirgSelector(budget=980)
    for sample in range(2):
        assert len(set(kept(gate(features), sample)) & set(kept(gate(half), sample))) >= 0.98 * 916


def test_not_a_number_is_loud() -> None:
    features = make_features((2, 2))
    for value in (float("nan"), float("inf"), 1e30):
        tokens = features.tokens_BND.clone()
        tokens[1, 200] = value
        with pytest.raises(RuntimeError, match="not finite"):
            ShirgSelector(budget=69, **SMALL)(replace(features, tokens_BND=tokens))


# Each field of each group, and each value of each choice: (knobs it is compared to, knobs).
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"weights": {"similarity": 0.2}}),
    ({}, {"weights": {"neighbor": 0}}),
    ({"crop_term": "border"}, {"crop_term": "border", "weights": {"crop": 0.6}}),
    *(({}, {"neighbor": {"metric": metric}}) for metric in ("feature_cos", "local_var", "position")),
    ({}, {"neighbor": {"sign": 1}}),
    *(({}, {"norm": norm}) for norm in ("minmax", "rank", "none")),
    *(({"weights": {"crop": 0.6}}, {"weights": {"crop": 0.6}, "crop_term": t}) for t in ("border", "literal")),
    ({"crop_term": "border"}, {"crop_term": "border", "weights": {"crop": 0.6}}),
    *(({}, {"weights": {name: 0.5}}) for name in ("centre", "variance", "edge")),
    ({}, {"merge": {"mode": "tome"}}),
    ({"merge": {"mode": "tome"}}, {"merge": {"mode": "tome", "share": 0.1}}),
    ({}, {"diversity": {"mode": "mmr"}}),
    ({"diversity": {"mode": "mmr"}}, {"diversity": {"mode": "mmr", "weight": 0.1}}),
    ({}, {"adaptive": {"mode": "entropy", "temperature": 0.2}}),
    ({"adaptive": {"mode": "entropy", "temperature": 0.2}}, {"adaptive": {"mode": "entropy", "temperature": 5.0}}),
    (
        {"adaptive": {"mode": "entropy", "temperature": 0.2}},
        {"adaptive": {"mode": "entropy", "temperature": 0.2, "levels": [0.2, 1.0]}},
    ),
    ({}, {"adaptive": {"mode": "head", "levels": [0.4, 1.0], "tolerance": 0.7}}),
    ({}, {"scaffold": {"size": 4}}),
    ({"scaffold": {"size": 0}}, {"scaffold": {"size": "1/2"}}),
    ({}, {"scaffold": {"size": 0}}),
    ({}, {"scaffold": {"size": 3, "source": "canvas"}}),
    ({}, {"scaffold": {"size": 3, "space": "post"}}),
]


@pytest.mark.parametrize(("base", "knobs"), CHANGES, ids=lambda knobs: str(knobs))
def test_every_value_changes_what_the_model_reads(base: dict[str, Any], knobs: dict[str, Any]) -> None:
    features = make_features((2, 2), sizes=[(640, 480), (480, 640)])
    here = through(ShirgSelector(budget=69, **{**SMALL, **base}), features)
    assert differs(here, through(ShirgSelector(budget=69, **{**SMALL, **knobs}), features))


def test_every_field_of_every_group_is_tried() -> None:
    tried = {
        (group, name)
        for _, knobs in CHANGES
        for group, value in knobs.items()
        if isinstance(value, dict)
        for name in value
    }
    groups = {
        "weights": Weights,
        "neighbor": Neighbor,
        "scaffold": Scaffold,
        "merge": Merging,
        "diversity": Diversity,
        "adaptive": Adaptive,
    }
    assert tried == {(group, f.name) for group, kind in groups.items() for f in fields(kind)}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weights": {"text": 1}}, TypeError, "weights has no 'text'; it has similarity, neighbor, crop, centre"),
    ({"weights": {"crop": -1}}, ValueError, "weights.crop=-1: give a number >= 0"),
    ({"weights": {"similarity": 0, "neighbor": 0}}, ValueError, "nothing to rank by"),
    ({"neighbor": {"sign": 0}}, ValueError, "neighbor.sign=0: choose one of -1, 1"),
    ({"neighbor": {"metric": "l1"}}, ValueError, "neighbor.metric='l1': choose one of feature_l2, feature_cos"),
    ({"norm": "l2"}, ValueError, "norm='l2': choose one of zscore"),
    ({"norm": "none", "norm_scope": "view"}, ValueError, "norm_scope means nothing"),
    ({"crop_term": "centre"}, ValueError, "only geometry=seed_canvas48 has a centre crop"),
    ({"geometry": "squares"}, ValueError, "geometry='squares': choose one of lavida_tiles"),
    ({"geometry": "single_672"}, ValueError, "has no global view; choose scaffold.source=canvas"),
    ({"geometry": "fovea", "crop_term": "literal"}, ValueError, "has one on its canvas"),
    ({"geometry": "fovea", "norm_scope": "view"}, ValueError, "no tiles with statistics of their own"),
    ({"geometry": "single_672", "scaffold": {"size": 0}, "views": "all"}, ValueError, "no global view beside"),
    ({"geometry": "single_672", "scaffold": {"size": 0}, "mask_padding": False}, ValueError, "has no padding"),
    ({"geometry": "seed_canvas48", "scaffold": {"size": 0}, "dedup": "mean"}, ValueError, "choose underflow=mask"),
    ({"geometry": "seed_canvas48", "scaffold": {"size": 0}, "underflow": "raise"}, ValueError, "overlapping crops"),
    ({"dedup": "border"}, ValueError, "share cells; choose relevance"),
    ({"views": "some"}, ValueError, "views='some': choose one of tiles, all"),
    ({"views": "all", "underflow": "raise"}, ValueError, "does anyway"),
    ({"variance_of": "neighbourhood"}, ValueError, "variance_of means nothing"),
    ({"edge_space": "pixels"}, ValueError, "edge_space means nothing"),
    ({"coverage": -1}, ValueError, "coverage=-1: give the side of a region"),
    ({"coverage": 3, "diversity": {"mode": "mmr"}}, ValueError, "cannot promise coverage"),
    ({"merge": {"mode": "scores"}}, ValueError, "merge.mode='scores': choose one of none, tome"),
    ({"merge": {"share": 0.1}}, ValueError, "merge.share means nothing"),
    ({"merge": {"mode": "tome", "share": 0.6}}, ValueError, "up to 0.5"),
    ({"diversity": {"weight": 2.0}}, ValueError, "diversity.weight means nothing"),
    ({"diversity": {"mode": "mmr", "weight": 0}}, ValueError, "give a number above 0"),
    ({"scaffold": {"size": "3/2"}}, ValueError, "a share like '1/6'"),
    ({"crop_term": "border", "weights": {"crop": 0}}, ValueError, "counts nothing while weights.crop is 0"),
    ({"scaffold": {"size": -1}}, ValueError, "scaffold.size=-1: give the tokens per side"),
    ({"scaffold": {"size": 0, "source": "canvas"}}, ValueError, "while scaffold.size is 0"),
    ({"scaffold": {"source": "views"}}, ValueError, "scaffold.source='views': choose one of global, canvas"),
    ({"budget": "matched", "underflow": "raise"}, ValueError, "needs a budget in numbers"),
    ({"coord_embed": "sincos_linear"}, ValueError, "go together"),
    ({"coord_width": 16}, ValueError, "go together"),
    ({"budget": 0}, ValueError, "give a positive number of tokens or 'matched'"),
    ({"temperature": 1}, TypeError, "temperature"),
]


@pytest.mark.parametrize(("knobs", "error", "says"), BAD, ids=lambda value: str(value))
def test_bad_knobs_are_refused_in_one_sentence(knobs: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        ShirgSelector(**{"budget": 69, **knobs})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("budget", "least"), [(20, "20"), ("matched", "25")])
def test_a_scaffold_larger_than_the_budget_is_refused(budget: Any, least: str) -> None:
    with pytest.raises(ValueError, match=f"takes 36 tokens, but budget={budget} can be as small as {least}"):
        ShirgSelector(budget=budget, scaffold={"size": 6})(make_features())


def test_padding_may_be_kept_in_the_literal_reading() -> None:
    features = make_features((2, 2), sizes=[(3000, 150)])
    relevance: Tensor = (~features.valid_BN).float()
    literal = ShirgSelector(budget=69, mask_padding=False, **SMALL)(replace(features, relevance_BN=relevance))
    assert not bool(features.valid_BN[0, kept(literal)].any())
    assert all(features.layout.role_N[i] == 1 for i in kept(literal))
