"""An even context around any selector's choice."""

from functools import partial

import pytest
import torch

from baselines import EvenContext, Full, NormTopK, Random, Saint, ToMe, VisionZip
from shirg import Selector, ShirgSelector, Source, layout_tables
from tests.features import features_for
from tests.reference import kept
from tests.refusals import assert_says, message_of

INNER: list[Selector] = [
    Random(budget=60),
    Saint(budget=60),
    ToMe(budget=60),
    VisionZip(budget=60),
    ShirgSelector(budget=60, scaffold={"size": 3}),
    ShirgSelector(budget=60, scaffold={"size": 2}, summary=True, merge={"mode": "tome"}),
]


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: type(inner).__name__)
@pytest.mark.parametrize("evidence", [20, 0.3])
def test_the_choice_of_the_selector_and_an_even_rest(inner: Selector, evidence: float) -> None:
    selector = EvenContext(selector=inner, evidence=evidence)
    features = features_for(selector, sizes=[(640, 480), (1000, 300)])
    made = 60 - inner.resolve_budget(features)[0]
    count = evidence if isinstance(evidence, int) else int(evidence * (60 - made) + 0.5)
    alone = inner.at_budget(made + count)(features)
    chosen, layout, tables = selector(features), features.layout, layout_tables(features.layout)
    assert chosen.mask_BT.sum(-1).tolist() == [60, 60] and alone.mask_BT.sum(-1).tolist() == [made + count] * 2
    for b in range(2):
        before, after = kept(alone, b), kept(chosen, b)
        assert set(before) <= set(after)
        free = [i for i in layout.order_N.tolist() if features.valid_BN[b, i] and i not in before]
        even = sorted(free, key=lambda i: float(tables.even_P[tables.grid_cell_N[i]]))
        assert set(after) - set(before) == set(even[: 60 - made - count])
        assert after == sorted(after, key=lambda i: int(layout.rank_N[i])), "in reading order"
        for source in (Source.SCAFFOLD, Source.MERGED, Source.SUMMARY):
            made_alone, made_here = (
                s.tokens_BTD[b][(s.source_BT[b] == source) & s.mask_BT[b]].sort(0).values for s in (alone, chosen)
            )
            assert torch.equal(made_alone, made_here)
        sources = chosen.source_BT[b][chosen.mask_BT[b]].tolist()
        n_made = sources.count(Source.SCAFFOLD)
        assert sources[:n_made] == [Source.SCAFFOLD] * n_made
        assert Source.SUMMARY not in sources[:-1] and (sources[-1] == Source.SUMMARY) == (sources.count(2) == 1)


def test_a_merged_token_is_read_where_its_box_is() -> None:
    selector = EvenContext(selector=ToMe(budget=60), evidence=0.5)
    features = features_for(selector, sizes=[(640, 480)])
    chosen = selector(features)
    boxes = {tuple(box): i for i, box in enumerate(features.box_BN4()[0].tolist())}
    ranks = [int(features.layout.rank_N[boxes[tuple(box)]]) for box in chosen.box_BT4[0].tolist()]
    merged = int((chosen.source_BT == int(Source.MERGED)).sum())
    assert merged >= 20 and ranks == sorted(ranks)


@pytest.mark.parametrize("size", [(640, 480), (768, 768), (300, 1000)])
def test_around_shirg_it_is_the_allocation_of_shirg(size: tuple[int, int]) -> None:
    """At every share, because the scaffold is no part of it."""
    for evidence in (0.25, 0.5, 7):
        ours = ShirgSelector(budget=60, allocation={"mode": "evidence_context", "evidence": evidence})
        wrapped = EvenContext(selector=ShirgSelector(budget=60), evidence=evidence)
        features = features_for(ours, sizes=[size])
        a, b = ours(features), wrapped(features)
        assert torch.equal(a.index_BT, b.index_BT) and torch.equal(a.tokens_BTD, b.tokens_BTD)


def test_a_cell_that_two_crops_share_is_kept_once() -> None:
    """As long as there are others."""
    selector = EvenContext(selector=Random(budget=100, geometry="seed_canvas48"))
    features = features_for(selector, sizes=[(640, 480)])
    cells = layout_tables(features.layout).grid_cell_N
    evidence = kept(selector.selector.at_budget(50)(features))
    context = set(kept(selector(features))) - set(evidence)
    assert len(context) == 50 == len({int(cells[i]) for i in context})
    assert not {int(cells[i]) for i in context} & {int(cells[i]) for i in evidence}


def test_layers_of_the_selector_are_its_own_and_see_every_token() -> None:
    inner = ShirgSelector(budget=60, coord_embed="sincos_linear", coord_width=16)
    wrapped = EvenContext(selector=inner)
    assert inner.coords is not None and wrapped.inner is inner is inner.inner
    features = features_for(wrapped, sizes=[(640, 480)])
    before = wrapped(features).tokens_BTD
    torch.nn.init.normal_(inner.coords.linear.weight, generator=torch.Generator().manual_seed(0))
    assert bool(((wrapped(features).tokens_BTD - before).abs().amax(-1) > 0).all())


def test_refusals() -> None:
    assert_says(message_of(partial(EvenContext, selector=Random(budget="matched"))), "Random has budget=matched")
    assert_says(message_of(partial(EvenContext, selector=Full())), "Full has no budget: choose another selector")
    rows = ShirgSelector(budget=60, newline="row")
    assert_says(message_of(partial(EvenContext, selector=rows)), "choose newline=none")
    for wrong in (0, 1.0, -2, True):
        assert_says(message_of(partial(EvenContext, selector=NormTopK(budget=9), evidence=wrong)), "a share between")
    full = EvenContext(selector=Random(budget=20), evidence=20)
    assert_says(message_of(partial(full, features_for(full))), "Random chooses 20 tokens ... none for the context")
