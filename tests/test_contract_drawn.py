"""The contract on what hypothesis draws: layouts, masks, budgets, contents; and a ranking in plain Python."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shirg import Geometry, Role, Selection, Selector, ShirgSelector, Source, TokenLayout, VisionFeatures
from tests.features import GRIDS, geometry_layout, layout_of, make_features, recorded
from tests.test_contract import ALL, Case, assert_kept

CONTENTS = ("noise", "zero", "one", "hot", "huge")


@st.composite
def pictures(draw: st.DrawFn, geometry: Geometry, contents: Sequence[str] = CONTENTS) -> VisionFeatures:
    """A batch on a drawn canvas. Cells anywhere may be out of use, beside the letterbox, so that masks have any shape;
    but not of a picture squashed into a single view, which promises to have no padding.
    """
    side = draw(st.integers(4, 8))
    own = geometry == "lavida_tiles"
    layout = layout_of(draw(st.sampled_from(GRIDS)), side) if own else geometry_layout(geometry, side)
    sizes = draw(st.lists(st.tuples(st.integers(40, 1200), st.integers(40, 1200)), min_size=1, max_size=3))
    seed, content = draw(st.integers(0, 10**6)), draw(st.sampled_from(contents))
    features = make_features(layout=layout, sizes=sizes, seed=seed, side=side)
    generator = torch.Generator().manual_seed(seed)
    in_use = torch.rand(len(sizes), *map(max, layout.canvas, (1, 1)), generator=generator) < draw(st.floats(0.2, 1.0))
    row_N, col_N = layout.cell_N2.unbind(-1)
    is_global_N = layout.role_N == int(Role.GLOBAL)
    cell_BN = in_use[:, row_N.masked_fill(is_global_N, 0), col_N.masked_fill(is_global_N, 0)]
    valid_BN = features.valid_BN & (is_global_N | cell_BN | (geometry == "single_672"))
    # A picture has at least one token.
    valid_BN |= ~valid_BN.any(-1, keepdim=True) & (layout.cell_N2.sum(-1) == 0)
    x = features.tokens_BND
    tokens = {
        "noise": x,
        "zero": torch.zeros_like(x),
        "one": torch.ones_like(x),
        "hot": torch.zeros_like(x).index_fill_(1, torch.tensor([seed % layout.n_tokens]), 1.0),
        "huge": x * 1e4,
    }[content]
    n_valid = tuple(valid_BN.sum(-1).tolist())
    return replace(features, tokens_BND=tokens, valid_BN=valid_BN, n_valid=n_valid, taps=recorded(tokens))


def with_budget(case: Case, budget: int) -> Selector:
    return case.build(**{**case.knobs, **({"budget": budget} if "budget" in case.knobs else {})})


def ask(selector: Selector, features: VisionFeatures) -> Selection | None:
    """The selection; None where the budget is refused, in a sentence that names it."""
    try:
        chosen: Selection = selector(features)
    except ValueError as error:
        assert "budget" in str(error) or "coverage" in str(error) or "scaffold" in str(error), error
        return None
    return chosen


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_budget_mask_and_order(name: str, data: st.DataObject) -> None:
    case = ALL[name]
    features = data.draw(pictures(with_budget(case, 60).geometry))
    selector = with_budget(case, data.draw(st.integers(1, max(features.n_valid) + 1)))
    chosen = ask(selector, features)
    fits = isinstance(selector.budget, int) and selector.budget <= min(features.n_valid)
    if chosen is None:
        assert not fits or isinstance(selector, ShirgSelector), "refused a budget that every picture can meet"
        return
    assert_kept(features, chosen)
    if isinstance(selector.budget, int):
        counts = chosen.mask_BT.sum(-1)
        assert bool(
            (counts == selector.budget).all() if not selector.may_use_less else (counts <= selector.budget).all()
        )
    other = features.tokens_BND.flip(1)
    elsewhere = selector(replace(features, tokens_BND=other, taps=recorded(other)))
    assert elsewhere.mask_BT.shape == chosen.mask_BT.shape, "slots follow the layout"


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_drawn_picture_does_not_depend_on_its_batch_mates(name: str, data: st.DataObject) -> None:
    """Of noise alone: where all tokens are alike, the rounding of another batch size decides."""
    case = ALL[name]
    features = data.draw(pictures(with_budget(case, 60).geometry, ["noise"]))
    selector = with_budget(case, data.draw(st.integers(1, min(features.n_valid))))
    together = ask(selector, features)
    for sample in range(len(features.ids)):
        alone = ask(selector, features[sample : sample + 1])
        if together is not None:
            assert alone is not None and torch.equal(alone.index_BT[0], together.index_BT[sample])


def ranks_alone(name: str) -> bool:
    """Whether a selector is a ranking by its scores, and nothing is merged, averaged or picked one by one."""
    selector = with_budget(ALL[name], 60)
    if isinstance(selector, ShirgSelector):
        plain = selector.dedup != "mean" and selector.adaptive.mode == "none"
        return plain and (selector.merge.mode, selector.diversity.mode) == ("none", "none")
    return type(selector).select is Selector.select


@pytest.mark.parametrize("name", [name for name in ALL if ranks_alone(name)])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_kept_is_the_best_by_brute_force(name: str, data: st.DataObject) -> None:
    case = ALL[name]
    features = data.draw(pictures(with_budget(case, 60).geometry))
    selector = with_budget(case, data.draw(st.integers(1, min(features.n_valid))))
    chosen = ask(selector, features)
    if chosen is None:
        return
    scores_BN = chosen.scores_BN if chosen.scores_BN is not None else selector.score(features)
    for sample in range(len(features.ids)):
        kept = chosen.index_BT[sample][chosen.source_BT[sample] == int(Source.KEPT)]
        kept = kept[kept >= 0].tolist()
        rank = features.layout.rank_N.tolist()
        expected = brute_force(selector, features, scores_BN[sample].tolist(), sample, len(kept))
        assert kept == sorted(expected, key=lambda i: rank[i])


def brute_force(selector: Selector, features: VisionFeatures, score: list[float], sample: int, k: int) -> list[int]:
    """The k tokens to keep: representatives, then the others by score, then what only fills up."""
    layout = features.layout
    rank, role = layout.rank_N.tolist(), layout.role_N.tolist()
    free = [i for i in range(layout.n_tokens) if features.valid_BN[sample, i]]

    def ordered(tokens: list[int]) -> list[int]:
        return sorted(tokens, key=lambda i: (-score[i], rank[i]))

    if not isinstance(selector, ShirgSelector):
        return ordered(free)[:k]
    seated = [i for i in free if not layout.overlaps or i == seat_of(features, sample, i, free, selector)]
    tiles_only = selector.views == "tiles" and layout.canvas != (0, 0)
    competing = [i for i in seated if not tiles_only or role[i] != int(Role.GLOBAL)]
    best: dict[tuple[int, ...], int] = {}
    for i in ordered(competing) if selector.coverage else []:
        best.setdefault(region_of(layout, i, selector.coverage), i)
    first = list(best.values())
    tiers = [first, ordered([i for i in competing if i not in first])]
    tiers += [ordered([i for i in seated if i not in competing]), ordered([i for i in free if i not in seated])]
    return sum(tiers, [])[:k]


def seat_of(features: VisionFeatures, sample: int, token: int, free: list[int], selector: ShirgSelector) -> int:
    """Who sits in a token's cell: the most relevant, then the one deepest in its crop, then that of the first crop."""
    layout, r = features.layout, features.relevance_BN
    assert r is not None and selector.dedup == "relevance"
    cells, views = layout.cell_N2.tolist(), layout.view_N.tolist()
    origin = {v: layout.cell_N2[layout.view_N == v].amin(0).tolist() for v in set(views)}

    def depth(i: int) -> int:
        inside = [cell - start for cell, start in zip(cells[i], origin[views[i]], strict=True)]
        return min(min(x, layout.side - 1 - x) for x in inside)

    rivals = [i for i in free if cells[i] == cells[token]]
    return min(rivals, key=lambda i: (-float(r[sample, i]), -depth(i), views[i]))


def region_of(layout: TokenLayout, token: int, cells: int) -> tuple[int, ...]:
    """Which block of cells a token lies in: blocks begin anew in each view, or on the canvas where views overlap."""
    row, col = layout.cell_N2[token].tolist()
    if layout.overlaps:
        return row // cells, col // cells
    side = layout.side
    view: tuple[Any, ...] = (int(layout.role_N[token]), row // side, col // side)
    return *view, row % side // cells, col % side // cells
