"""Features from plain tensors: what is filled in, and every selector on grids that are not LaViDa's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines import DivPrune, Saint, TopV, UniformGrid
from shirg import (
    Pooling,
    Role,
    Selection,
    Selector,
    ShirgGate,
    Source,
    UserError,
    VisionFeatures,
    features_from,
    saliency,
    tiles_layout,
)
from tests.features import recorded
from tests.test_contract import ALL, assert_kept


@dataclass(frozen=True)
class Shape:
    """How the tokens of some model are arranged."""

    grid: tuple[int, int]
    views: tuple[int, int] | None = None
    global_view: Any = "first"

    @property
    def n_views(self) -> int:
        rows, cols = self.views or (0, 0)
        return rows * cols + (self.global_view != "none")


SHAPES = {
    "tiles": Shape((9, 9), (2, 2)),
    "thumbnail last": Shape((8, 8), (3, 2), "last"),
    "dynamic": Shape((11, 17)),
    "no global view": Shape((7, 9), (1, 3), "none"),
}


def tokens_of(shape: Shape, batch: int = 2, width: int = 16, seed: int = 0) -> Tensor:
    """Smooth tokens with some noise [B, V, n, D]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, shape.n_views, shape.grid[0] * shape.grid[1], width, generator=generator)
    return x + 0.6 * x.roll(1, 2) + 0.3 * x.roll(2, 2)


def features_of(shape: Shape, **options: Any) -> VisionFeatures:
    tokens = options.pop("tokens", None)
    tokens = tokens_of(shape) if tokens is None else tokens
    flat = tokens.flatten(1, 2)
    given: dict[str, Any] = {
        "taps": recorded(flat),
        "relevance": saliency(flat),
        "boxes": [[(0.1, 0.1, 0.3, 0.2)]] * len(flat),
        "pooling": Pooling(side=-(-min(shape.grid) // 2)),
        "base": 120,
    }
    views = {} if shape.views is None else {"views": shape.views, "global_view": shape.global_view}
    return features_from(tokens, grid=shape.grid, **views, **{**given, **options})


NO_SQUARE = "are not square"
NO_GLOBAL = "no view of the whole picture"
OTHER = "the features are of lavida_tiles"
REFUSED: dict[str, dict[str, str]] = {
    "dynamic": {"pooled": NO_SQUARE},
    "no global view": {
        "pooled": "not square|no view of the whole picture",
        "global_only": NO_GLOBAL,
        "shirg": NO_GLOBAL,
        "shirg_div": NO_GLOBAL,
        "shirg_learned": NO_GLOBAL,
        "even_context_ShirgSelector": NO_GLOBAL,
        "everything": NO_GLOBAL,
    },
}
"""Which selectors of the contract refuse which shape, and words of the message."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_each_selector_works_or_says_why_not(name: str, shape: str) -> None:
    case = ALL[name]
    selector = case.build(**case.options)
    features = features_of(SHAPES[shape])
    words = OTHER if selector.geometry != "lavida_tiles" else REFUSED.get(shape, {}).get(name)
    if words is not None:
        with pytest.raises(UserError, match=words):
            selector(features)
        return
    chosen = selector(features)
    assert_kept(features, chosen)
    assert bool(chosen.tokens_BTD.isfinite().all())
    budget = case.options.get("budget")
    if budget is not None and not selector.may_use_less_on(features.layout):
        newlines = (chosen.source_BT == int(Source.NEWLINE)) & chosen.mask_BT
        assert (chosen.mask_BT & ~newlines).sum(-1).tolist() == [budget] * 2


def test_tiles_are_laid_out_as_lavidas() -> None:
    ours = features_of(SHAPES["tiles"]).layout
    known = tiles_layout(2, 2, side=9, patch_px=1, view_px=9, pooling=None)
    for name in ("view_N", "role_N", "cell_N2", "centre_N2", "size_N2", "rank_N"):
        assert torch.equal(getattr(ours, name), getattr(known, name)), name
    assert (ours.canvas, ours.n_global, ours.n_views, ours.side) == ((18, 18), 81, 5, 9)


def test_a_global_view_may_come_last() -> None:
    """The same views in another order: the same tokens are kept, under the numbers that the caller gave them."""
    first, last = Shape((8, 8), (2, 2)), Shape((8, 8), (2, 2), "last")
    tokens = tokens_of(first)
    moved = tokens.roll(-1, 1)
    options: dict[str, Any] = {"budget": 40, "scaffold": {"size": 2}, "views": "all"}
    here = ShirgGate(**options)(features_of(first, tokens=tokens))
    there = ShirgGate(**options)(features_of(last, tokens=moved))
    assert torch.equal(here.tokens_BTD, there.tokens_BTD) and torch.equal(here.box_BT4, there.box_BT4)
    kept = here.index_BT >= 0
    assert torch.equal((here.index_BT[kept] - 64) % 320, there.index_BT[kept])


@pytest.mark.parametrize(
    "options",
    [
        {"neighbour": {"metric": "feature_l2"}},
        {"weights": {"variance": 0.5, "edge": 0.5}, "variance_of": "neighbourhood"},
        {"coverage": 3},
        {"weights": {"centre": 1.0}, "crop_term": "border"},
    ],
    ids=str,
)
def test_a_rectangle_on_its_side_gives_the_same_choice(options: dict[str, Any]) -> None:
    """Rows and columns of a view are never taken for each other."""
    tall = Shape((7, 12))
    tokens = tokens_of(tall)
    turned = tokens.unflatten(2, (7, 12)).transpose(2, 3).flatten(2, 3)
    selector = ShirgGate(budget=40, scaffold={"size": 4}, **options)
    here, there = selector(features_of(tall, tokens=tokens)), selector(features_of(Shape((12, 7)), tokens=turned))

    def cells(chosen: Selection, row: int, cols: int) -> set[tuple[int, int]]:
        return {(i // cols, i % cols) for i in chosen.index_BT[row].tolist() if i >= 0}

    for row in range(2):
        assert cells(here, row, 12) == {(r, c) for c, r in cells(there, row, 7)}
    coarse = [chosen.tokens_BTD[:, :16].unflatten(1, (4, 4)) for chosen in (here, there)]
    assert torch.allclose(coarse[0], coarse[1].transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("build", [Saint, DivPrune, TopV, UniformGrid])
def test_views_of_a_rectangle_are_chosen_from_one_by_one(build: Callable[..., Selector]) -> None:
    shape = Shape((5, 8), (2, 1), "none")
    tokens = tokens_of(shape)
    together = build(budget=22)(features_of(shape, tokens=tokens))
    for view in range(2):
        alone = build(budget=11)(features_of(Shape((5, 8)), tokens=tokens[:, view : view + 1]))
        here = together.index_BT[(together.index_BT >= 40 * view) & (together.index_BT < 40 * view + 40)]
        assert torch.equal(here.view(2, 11) - 40 * view, alone.index_BT)


def test_what_is_absent_is_filled_in() -> None:
    features = features_from(torch.randn(3, 35, 4), grid=(5, 7))
    assert features.ids == ("picture-0", "picture-1", "picture-2") and features.n_valid == (35, 35, 35)
    assert bool(features.valid_BN.all()) and features.size_B2.tolist() == [[7, 5]] * 3
    assert features.picture_B4.tolist() == [[0, 0, 1, 1]] * 3
    assert features.relevance_BN is None and not features.taps and features.boxes is None
    first = features.box_BN4()[0, 0].tolist()
    assert first == pytest.approx([0, 0, 1 / 7, 1 / 5])
    assert bool((features.layout.role_N == Role.GLOBAL).all())


def test_tensors_may_come_by_view_or_flat() -> None:
    shape, keys = SHAPES["tiles"], torch.randn(2, 5, 81, 2, 8)
    tokens, valid = tokens_of(shape), torch.rand(2, 5, 81) > 0.2
    by_view = features_of(shape, tokens=tokens, valid=valid, keys=keys, attention=keys[..., 0, 0])
    flat = features_from(
        tokens.flatten(1, 2),
        grid=(9, 9),
        views=(2, 2),
        valid=valid.flatten(1),
        keys=keys.flatten(1, 2),
        attention=keys[..., 0, 0].flatten(1),
    )
    assert torch.equal(by_view.tokens_BND, flat.tokens_BND) and torch.equal(by_view.valid_BN, flat.valid_BN)
    assert by_view.layout.n_views == 5 and by_view.n_valid == tuple(valid.sum((1, 2)).tolist())
    for tap in ("keys@*", "attention@*"):
        assert torch.equal(by_view.taps[tap], flat.taps[tap])


def test_maps_of_attention_become_what_each_token_receives() -> None:
    maps = torch.rand(2, 5, 3, 81, 81).softmax(-1)
    features = features_of(SHAPES["tiles"], attention=maps)
    expected = torch.zeros(2, 5, 81)
    for head in range(3):
        for query in range(81):
            expected += maps[:, :, head, query] / (3 * 81)
    assert torch.allclose(features.taps["attention@*"], expected.flatten(1), atol=1e-6)
    one_view = features_of(SHAPES["dynamic"], attention=torch.rand(2, 3, 187, 187).softmax(-1))
    assert one_view.taps["attention@*"].sum(-1).tolist() == pytest.approx([1, 1])


def test_given_keys_serve_any_layer_and_a_named_tap_goes_first() -> None:
    shape, generator = SHAPES["tiles"], torch.Generator().manual_seed(3)
    one, other = (torch.randn(2, 405, 2, 8, generator=generator) for _ in range(2))
    any_layer = features_of(shape, taps={}, keys=one)
    named = replace(any_layer, taps={**any_layer.taps, "keys@-2": other})
    for layer in (-1, 0.83, 3):
        assert torch.equal(
            Saint(budget=60, layer=layer)(any_layer).index_BT, Saint(budget=60, layer=-1)(named).index_BT
        )
    expected = Saint(budget=60, layer=-1)(features_of(shape, taps={"keys@-1": other}))
    assert torch.equal(Saint(budget=60, layer=-2)(named).index_BT, expected.index_BT)
    assert not torch.equal(Saint(budget=60, layer=-1)(named).index_BT, expected.index_BT)


def test_shares_of_the_base_budget() -> None:
    features = features_of(SHAPES["tiles"], base=120)
    for budget, count in (("base", 120), ("3/4 base", 90), ("1/7 base", 17)):
        assert Saint(budget=budget)(features).mask_BT.sum(-1).tolist() == [count] * 2
        assert ShirgGate(budget=budget, scaffold={"size": 3})(features).mask_BT.sum(-1).tolist() == [count] * 2


def test_the_base_models_own_count() -> None:
    """LLaVA-NeXT: whole views, the picture's rows closed by newlines, padding cut off; both pictures fill half."""
    tokens = torch.randn(2, 5, 16, 4)
    features = features_from(tokens, grid=(4, 4), views=(2, 2), sizes=[(200, 100), (50, 100)], pooling=Pooling(side=4))
    chosen = UniformGrid(budget="matched")(features)
    assert chosen.mask_BT.sum(-1).tolist() == [16 + 4 * 9, 16 + 8 * 5]


def test_it_prints_shortly() -> None:
    features = features_of(SHAPES["no global view"])
    assert "tokens [2, 189, 16] torch.float32, valid 189, relevance given" in repr(features)
    assert "TokenLayout(189 tokens: 3 tiles of 7 x 9, canvas 7 x 27, lavida_tiles)" in repr(features)
    chosen = ShirgGate(budget=60, scaffold={"size": 3, "source": "canvas"})(features)
    assert repr(chosen) == "Selection(tokens [2, 60, 16] torch.float32, used: 51 kept, 9 scaffold)"
