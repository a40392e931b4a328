"""The published methods against loops over tokens, on pictures with and without padding."""

import math
from fractions import Fraction

import pytest
import torch

from baselines import (
    CDPruner,
    DivPrune,
    HiPrune,
    HoloV,
    LlavaScissor,
    OTPrune,
    Saint,
    SaintVote,
    ToMe,
    TopV,
    UniformGrid,
    VisionZip,
    VisPruner,
    base,
)
from baselines.base import GroupSelector
from shirg import Source, VisionFeatures, features_from
from tests import reference
from tests.features import SIZES, make_features, recorded

SCOPES = ("per_view", "global")
ORDERS = ("official", "reading")
GRIDS = [(2, 2), (1, 2), (0, 0)]


def pictures(grid: tuple[int, int]) -> VisionFeatures:
    return make_features(grid, side=6, sizes=SIZES[grid], width=24)


def groups_of(features: VisionFeatures, scope: str) -> int:
    return features.layout.n_views if scope == "per_view" else 1


def kept(selector: GroupSelector, features: VisionFeatures) -> list[list[int]]:
    """The tokens that each picture keeps."""
    chosen = selector(features)
    return [reference.kept(chosen, sample) for sample in range(len(features.ids))]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [15, 31])  # two tokens of a group have the same degree: leave more of each
def test_choices_are_those_of_the_loops(grid: tuple[int, int], scope: str, budget: int) -> None:
    features = pictures(grid)
    common = {"budget": budget, "scope": scope}
    three, half = {"rho": 3 / features.layout.n_tokens * groups_of(features, scope)}, Fraction(1, 2)
    votes = {"tau": 0.6, "tau_step": 0.25, "votes": 2, "gamma": 3.0}
    pairs: list[tuple[GroupSelector, reference.Pick]] = [
        (Saint(**common), reference.saint(features, 0.0625, "keys@0.83", "alternating")),
        (Saint(**common, rho=0.25), reference.saint(features, 0.25, "keys@0.83", "alternating")),
        (Saint(**common, schedule="constant"), reference.saint(features, 0.0625, "keys@0.83", "constant")),
        (SaintVote(**common, **votes), reference.saint_vote(features, 0.6, 0.25, 2, 3.0, "keys@0.83")),
        (DivPrune(**common), reference.divprune(features)),
    ]
    pairs += [
        (VisPruner(**common, **three, order=order), reference.vispruner(features, half, 3, "attention@-1", order))
        for order in ORDERS
    ]
    for selector, pick in pairs:
        assert kept(selector, features) == reference.in_groups(features, scope, budget, pick), type(selector).__name__


def test_saint_drops_few_and_many_tokens_in_turn() -> None:
    """64 tokens to 16 as the published code does: 64 // 16, then 60 // 4, 45 // 15, 42 // 3, 28 // 14, and the rest."""
    assert reference.saint_drops(64, 16, 1 / 16, "alternating") == [4, 15, 3, 14, 2, 10]
    assert reference.saint_drops(64, 16, 1 / 16, "constant") == [4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("rho", [1 / 16, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("schedule", ["alternating", "constant"])
def test_saint_has_rounds_enough_for_every_group(rho: float, schedule: str) -> None:
    """Groups of up to 90 tokens and every quota between the smallest share and all; the bound is not far off."""
    saint, closest = Saint(budget=1, rho=rho, schedule=schedule), math.inf
    for most in (1, 2, 3, 17, 64, 90):
        for share in (0.02, 0.1, 0.26, 0.5, 0.93, 1.0):
            rounds = saint.rounds(most, share)
            for n in range(1, most + 1):
                for quota in range(math.floor(share * n), n + 1):
                    needed = len(reference.saint_drops(n, quota, rho, schedule)) if quota else 0
                    assert needed <= rounds, (most, share, n, quota)
                    closest = min(closest, rounds - needed)
    assert closest <= 2


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cached", [1, 200])
def test_votes_are_the_same_counted_in_strips(scope: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CACHED", cached)
    features = pictures((2, 2))
    expected = reference.in_groups(features, scope, 31, reference.saint_vote(features, 0.6, 0.25, 2, 3.0, "keys@0.83"))
    assert kept(SaintVote(budget=31, scope=scope, tau=0.6, tau_step=0.25, votes=2, gamma=3.0), features) == expected


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_cdpruner_picks_the_largest_determinant(scope: str, sign: int) -> None:
    features = pictures((1, 2))
    expected = reference.in_groups(features, scope, 12, reference.cdpruner(features, sign))
    assert kept(CDPruner(budget=12, scope=scope, sign=sign), features) == expected


@pytest.mark.parametrize("power", [1, 20])
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_rounding_changes_no_pick_of_cdpruner_below_the_rank(power: int, spread: float) -> None:
    """100 of 256 tokens of width 128. Skewed relevance leaves tiny remainders, but not beside their own token."""
    generator = torch.Generator().manual_seed(power)
    centres = torch.randn(8, 128, generator=generator)[torch.randint(8, (256,), generator=generator)]
    tokens = (centres + spread * torch.randn(256, 128, generator=generator))[None]
    relevance = torch.rand(1, 256, generator=generator) ** power
    features = make_features((0, 0), side=16, sizes=[(100, 100)], tokens=tokens, relevance=relevance)
    picks, remainders = reference.cdpruner_picks(features, 100)
    assert kept(CDPruner(budget=100), features) == [sorted(picks)]
    assert (min(remainders) < 1e-5) == (power == 20), "an absolute limit would cut some of these off"


def test_cdpruner_reads_constant_relevance_as_none() -> None:
    """Then diversity alone decides, by volume."""
    features = make_features((0, 0), side=6, sizes=[(100, 100)], width=24, relevance=torch.full((1, 36), 0.3))
    chosen = torch.tensor(kept(CDPruner(budget=6), features)[0])
    assert float(reference.cosines(features, 0)[chosen][:, chosen].det()) > 0.1
    assert chosen.tolist() != list(range(6))


def test_cdpruner_goes_by_relevance_when_the_width_is_used_up() -> None:
    """Two dimensions: two picks by diversity, the others by relevance."""
    features = make_features((0, 0), side=4, sizes=[(100, 100)], width=2)
    r = features.relevance_BN[0]
    (chosen,) = kept(CDPruner(budget=6), features)
    first = int(r.argmax())
    assert first in chosen
    rest = [i for i in r.argsort(descending=True).tolist() if i in chosen]
    skipped = [i for i in range(16) if i not in chosen]
    assert sum(float(r[i]) < float(r[skipped].max()) for i in rest) <= 1, (
        "one pick for diversity, the rest by relevance"
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rho", ["0.001", "0.1", "0.9"])
def test_tome_merges_what_the_loop_merges(grid: tuple[int, int], scope: str, rho: str, order: str) -> None:
    features = pictures(grid)
    r = max(1, round(Fraction(rho) * features.layout.n_tokens / groups_of(features, scope)))
    members: list[dict[int, list[int]]] = [{} for _ in features.ids]
    expected = reference.in_groups(features, scope, 20, reference.tome(features, r, "keys@-1", order, members))
    chosen = ToMe(budget=20, scope=scope, rho=float(rho), order=order)(features)
    merged = 0
    for sample, tokens in enumerate(expected):
        for slot, token in enumerate(tokens):
            joined = members[sample][token]
            mean = features.tokens_BND[sample, joined].mean(0)
            torch.testing.assert_close(chosen.tokens_BTD[sample, slot], mean, rtol=0, atol=1e-5)
            assert torch.equal(chosen.box_BT4[sample, slot], features.box_BN4()[sample, token])
            is_merged = len(joined) > 1
            merged += is_merged
            assert int(chosen.index_BT[sample, slot]) == (-1 if is_merged else token)
            assert int(chosen.source_BT[sample, slot]) == (Source.MERGED if is_merged else Source.KEPT)
        assert sorted(sum(members[sample].values(), [])) == torch.where(features.valid_BN[sample])[0].tolist()
    assert merged > 10


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("targets", ["official", "centres"])
@pytest.mark.parametrize("share", ["0.3", "0.07", "1"])
def test_visionzip_merges_what_the_loop_merges(grid: tuple[int, int], scope: str, targets: str, share: str) -> None:
    features = pictures(grid)
    joined: list[dict[int, list[int]]] = [{} for _ in features.ids]
    loop = reference.visionzip(features, Fraction(share), "-1", targets, joined)
    expected = reference.in_groups(features, scope, 20, loop)
    chosen = VisionZip(budget=20, scope=scope, contextual=float(share), targets=targets)(features)
    for sample, tokens in enumerate(expected):
        for slot, token in enumerate(tokens):
            members = joined[sample].get(token, [])
            x = features.tokens_BND[sample]
            wanted = x[token] + x[members].mean(0) if members else x[token]
            torch.testing.assert_close(chosen.tokens_BTD[sample, slot], wanted, rtol=0, atol=1e-5)
            assert int(chosen.index_BT[sample, slot]) == (-1 if members else token)
        assert any(joined[sample].values())


GROUP_SELECTORS = (CDPruner, DivPrune, Saint, SaintVote, ToMe, VisionZip, VisPruner, TopV, HoloV, HiPrune, OTPrune)


@pytest.mark.parametrize("build", [*GROUP_SELECTORS, UniformGrid, LlavaScissor])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_views_of_one_or_two_tokens(build: type[GroupSelector], grid: tuple[int, int]) -> None:
    """Nothing resembles a single token, and it is kept or not by its view's quota."""
    area = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(area)
    tokens = torch.randn(2, 5 * area, 8, generator=generator)
    common = {"relevance": torch.rand(2, 5 * area, generator=generator), "taps": recorded(tokens)}
    features = features_from(tokens, grid=grid, views=(2, 2), **common)
    for budget in range(1, 5 * area + 1):
        selector = build(budget=budget)
        chosen = selector(features)
        used = chosen.mask_BT.sum(-1).tolist()
        assert used == [budget] * 2 or (selector.may_use_less and max(used) <= budget and min(used) > 0)
        assert bool(chosen.tokens_BTD.isfinite().all())
    whole = build(budget=5 * area)(features)
    if not build.may_use_less:
        assert torch.equal(whole.tokens_BTD, tokens[:, features.layout.order_N])


@pytest.mark.parametrize("build", GROUP_SELECTORS)
@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_a_view_with_the_quota_0_keeps_nothing(build: type[GroupSelector], budget: int) -> None:
    tokens = torch.randn(1, 5 * 16, 8, generator=torch.Generator().manual_seed(budget))
    common = {"relevance": torch.rand(1, 80, generator=torch.Generator().manual_seed(0)), "taps": recorded(tokens)}
    features = features_from(tokens, grid=(4, 4), views=(2, 2), **common)
    chosen = build(budget=budget, **({"scope": "per_view"} if build is HoloV else {}))(features)
    # As many views as tokens; a merged token has no number, but the box of a place in its view.
    near_TN = torch.cdist(chosen.box_BT4[0], features.box_BN4()[0])
    views = sorted(features.layout.view_N[near_TN.argmin(-1)].tolist())
    assert views == {1: [4], 2: [2, 4], 3: [1, 3, 4], 4: [1, 2, 3, 4]}[budget] and float(near_TN.amin(-1).max()) == 0


def test_duplicates_go_first() -> None:
    """Of sixteen tokens twelve are one and the same: what looks for redundancy keeps the four others."""
    tokens = torch.ones(1, 16, 8)
    for axis, token in enumerate((1, 7, 8, 14)):
        tokens[0, token] = torch.eye(8)[axis]
    features = make_features((0, 0), side=4, sizes=[(90, 90)], tokens=tokens)
    features.taps["keys@0.83"] = tokens[:, :, None]
    for selector in (DivPrune(budget=5), Saint(budget=5), VisPruner(budget=5, important=0.0, rho=0.01)):
        assert {1, 7, 8, 14} <= set(kept(selector, features)[0]), type(selector).__name__
