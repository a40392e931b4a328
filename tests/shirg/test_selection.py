"""The base class: budgets, validation and what a method that only scores gets for free."""

from dataclasses import replace

import pytest
import torch

from shirg import (
    Pooling,
    Selection,
    Source,
    join,
    keep,
    pooled_count_B,
    stable_topk,
    tiles_layout,
)
from tests.features import make_features
from tests.shirg.test_refusals import Norm
from tests.test_contract import ALL


def test_a_method_that_only_scores() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    chosen = Norm(budget=40)(features)
    norms = features.tokens_BND[0].norm(dim=-1).masked_fill(~features.valid_BN[0], -1)
    best = norms.sort(descending=True).indices[:40]
    assert chosen.index_BT[0].tolist() == sorted(best.tolist(), key=lambda i: int(features.layout.rank_N[i]))
    assert chosen.scores_BN is not None and torch.equal(chosen.scores_BN[0], features.tokens_BND[0].norm(dim=-1))


def test_equal_scores_go_to_the_lower_index() -> None:
    assert stable_topk(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), 4).tolist() == [[1, 3, 0, 2]]


def test_a_budget_of_all_tokens() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    chosen = Norm(budget=405)(features)
    assert bool(chosen.mask_BT.all()) and chosen.index_BT[0].tolist() == features.layout.order_N.tolist()


def test_a_matched_budget_never_reaches_into_padding() -> None:
    # Pooling that does not shrink: the base model's count, newlines included, is larger than what there is.
    layout = tiles_layout(2, 2, side=4, patch_px=14, view_px=62, pooling=Pooling(side=4))
    features = make_features(layout=layout, sizes=[(640, 480)])
    assert (int(pooled_count_B(layout, features.size_B2)), features.n_valid) == (70, (64,))
    chosen = Norm(budget="matched")(features)
    assert int(chosen.mask_BT.sum()) == 64
    assert bool(features.valid_BN[0, chosen.index_BT[chosen.mask_BT]].all())


def test_scores_that_are_not_finite_raise_except_in_padding() -> None:
    features = make_features((2, 2), sizes=[(640, 480)])
    tap = features.taps["encoder"].clone()
    tap[0, int((~features.valid_BN[0]).nonzero()[0])] = float("nan")
    Norm(budget=40)(replace(features, taps={"encoder": tap}))
    tap[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="Norm: the score of a token is not finite"):
        Norm(budget=40)(replace(features, taps={"encoder": tap}))


def test_some_of_the_pictures() -> None:
    features = make_features((2, 2), sizes=[(768, 768), (640, 480), (480, 640)])
    part = features[1:]
    assert part.ids == ("picture-1", "picture-2") and part.n_valid == features.n_valid[1:]
    assert part.layout is features.layout
    for name in ("tokens_BND", "valid_BN", "picture_B4", "size_B2", "relevance_BN"):
        assert torch.equal(getattr(part, name), getattr(features, name)[1:]), name
    assert torch.equal(part.taps["encoder"], features.taps["encoder"][1:])


def test_unused_slots_are_last_and_empty() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    chosen = keep(features, torch.tensor([[300, 5, 120, 7]]), torch.tensor([2]))
    assert chosen.index_BT.tolist() == [[5, 300, -1, -1]] and chosen.mask_BT.tolist() == [[True, True, False, False]]
    assert bool((chosen.tokens_BTD[0, 2:] == 0).all())


def test_join() -> None:
    features = make_features((2, 2), sizes=[(768, 768)])
    parts: list[Selection] = [keep(features, torch.tensor([[i]]), torch.tensor([1])) for i in (9, 3)]
    both = join(parts[0], replace(parts[1], scores_BN=torch.zeros(1, 405)))
    assert both.index_BT.tolist() == [[9, 3]] and both.scores_BN is not None
    assert both.source_BT.tolist() == [[int(Source.KEPT)] * 2]
    assert torch.equal(both.tokens_BTD, features.tokens_BND[:, [9, 3]])


@pytest.mark.parametrize("name", ALL)
def test_it_prints_the_options_that_are_not_defaults(name: str) -> None:
    case = ALL[name]
    here = repr(case.build(**case.options))
    assert here.startswith(f"{case.build.__name__}(") and "\n" not in here
    for option, value in case.flips.items():
        flipped = value if isinstance(value, dict) else {option: value}
        try:
            there = repr(case.build(**{**case.options, **flipped}))
        except ValueError:
            continue
        assert there != here and (option in there or option in here), option
