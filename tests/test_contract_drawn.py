"""The contract on what hypothesis draws: layouts, masks, budgets, contents, types; and a ranking in plain Python."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shirg import Geometry, Role, Selection, Selector, ShirgSelector, VisionFeatures, picture_counts
from tests.features import GRIDS, geometry_layout, layout_of, make_features, recorded
from tests.reference import best_tokens, kept
from tests.test_contract import ALL, Case, assert_kept

CONTENTS = ("noise", "zero", "one", "hot", "huge")


@st.composite
def pictures(draw: st.DrawFn, geometry: Geometry, contents: Sequence[str] = CONTENTS) -> VisionFeatures:
    """A batch on a drawn canvas. Cells anywhere may be invalid, so that masks have any shape; but not in a global view
    beside tiles, which has no padding.
    """
    side = draw(st.integers(4, 8))
    own = geometry == "lavida_tiles"
    layout = layout_of(draw(st.sampled_from(GRIDS)), side) if own else geometry_layout(geometry, side)
    sizes = draw(st.lists(st.tuples(st.integers(40, 1200), st.integers(40, 1200)), min_size=1, max_size=3))
    seed, content = draw(st.integers(0, 10**6)), draw(st.sampled_from(contents))
    features = make_features(layout=layout, sizes=sizes, seed=seed, side=side)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(sizes), *layout.finest[1], generator=generator) < draw(st.floats(0.2, 1.0))
    row_N, col_N = layout.cell_N2.unbind(-1)
    is_global_N = (layout.role_N == int(Role.GLOBAL)) & (layout.canvas != (0, 0))
    cell_BN = drawn[:, row_N.masked_fill(is_global_N, 0), col_N.masked_fill(is_global_N, 0)]
    valid_BN = features.valid_BN & (is_global_N | cell_BN | (geometry == "single_672"))
    # A picture has at least one token.
    valid_BN |= ~valid_BN.any(-1, keepdim=True) & (layout.cell_N2.sum(-1) == 0)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = features.tokens_BND
    tokens = {
        "noise": x,
        "zero": torch.zeros_like(x),
        "one": torch.ones_like(x),
        "hot": torch.zeros_like(x).index_fill_(1, torch.tensor([seed % layout.n_tokens]), 1.0),
        "huge": x * (5e2 if dtype == torch.float16 else 1e4),
    }[content].to(dtype)
    known = {"n_valid": tuple(valid_BN.sum(-1).tolist()), "counts": picture_counts(layout, valid_BN, None)}
    return replace(features, tokens_BND=tokens, valid_BN=valid_BN, taps=recorded(tokens), **known)


def with_budget(case: Case, budget: int) -> Selector:
    return case.build(**{**case.options, **({"budget": budget} if "budget" in case.options else {})})


def ask(selector: Selector, features: VisionFeatures) -> Selection | None:
    """The selection; None where the budget is refused, in a sentence that names it."""
    try:
        chosen: Selection = selector(features)
    except ValueError as error:
        assert "budget" in str(error) or "coverage" in str(error) or "scaffold" in str(error), error
        return None
    return chosen


def ranks_alone(name: str) -> bool:
    """Whether a selector is a ranking by its scores, and nothing is merged, averaged or picked one by one."""
    selector = with_budget(ALL[name], 60)
    if isinstance(selector, ShirgSelector):
        plain = selector.options.dedup != "mean" and selector.options.adaptive.mode == "none"
        return plain and (selector.options.merge.mode, selector.options.diversity.mode) == ("none", "none")
    return type(selector).select is Selector.select


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_budget_mask_order_and_rank(name: str, data: st.DataObject) -> None:
    """The budget is met by valid tokens in reading order; where a selector ranks, by the best of them."""
    case = ALL[name]
    features = data.draw(pictures(with_budget(case, 60).geometry))
    budgets = st.integers(1, min(features.n_valid)) | st.integers(1, max(features.n_valid) + 1)
    selector = with_budget(case, data.draw(budgets))
    chosen = ask(selector, features)
    fits = isinstance(selector.budget, int) and selector.budget <= min(features.n_valid)
    if chosen is None:
        assert not fits or isinstance(selector, ShirgSelector), "refused a budget that every picture can meet"
        return
    assert_kept(features, chosen)
    counts = chosen.mask_BT.sum(-1)
    if isinstance(selector.budget, int):
        less = selector.may_use_less_on(features.layout)
        assert bool((counts <= selector.budget).all() if less else (counts == selector.budget).all())
    if ranks_alone(name):
        scores_BN = chosen.scores_BN if chosen.scores_BN is not None else selector.score(features)
        rank = features.layout.rank_N.tolist()
        for sample in range(len(features.ids)):
            index = kept(chosen, sample)
            best = best_tokens(selector, features, scores_BN[sample].tolist(), sample, len(index))
            assert index == sorted(best, key=lambda i: rank[i])


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6, deadline=None)
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
