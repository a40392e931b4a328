"""LLaVA-Scissor against loops that are made from the paper's formula: no numbers of the official code are at hand."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import LlavaScissor, linkage, llava_scissor
from baselines.linkage import components, cut, spanning_tree, sum_rows
from shirg import Source, VisionFeatures
from tests.features import SIZES, make_features

GRIDS = [(2, 2), (1, 2), (0, 0)]
SCOPES = ("per_view", "global")


def pictures(grid: tuple[int, int], **options: Any) -> VisionFeatures:
    return make_features(grid, side=6, sizes=SIZES[grid], width=24, **options)


@dataclass
class Component:
    """One component of one step: what it is made of, where it is read, its vector."""

    members: list[int]
    hub: int
    vector: Tensor


def connect(vectors: list[Tensor], places: list[int], tau: float) -> list[Component]:
    """Union-find over all pairs; `places` says where each vector is read, and the components are in that order."""
    n = len(vectors)
    unit = F.normalize(torch.stack(vectors), dim=-1)
    cosine = (unit @ unit.T).tolist()
    parent, degree = list(range(n)), [0] * n

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(n):
        for j in range(n):
            if i != j and cosine[i][j] > tau:
                degree[i] += 1
                parent[root(i)] = root(j)
    found = []
    for r in {root(i) for i in range(n)}:
        members = [i for i in range(n) if root(i) == r]
        hub = max(members, key=lambda i: (degree[i], -places[i]))
        found.append(Component(members, places[hub], torch.stack([vectors[i] for i in members]).mean(0)))
    return sorted(found, key=lambda component: component.hub)


def two_steps(x: Tensor, groups: list[list[int]], tau: float) -> tuple[list[Component], list[Component]]:
    """Components of step 1, and of step 2 with parts as members; hubs are places in the order of the groups."""
    order = sum(groups, [])
    parts = []
    for group in groups:
        places = [order.index(i) for i in group]
        for part in connect([x[i] for i in group], places, tau) if group else []:
            parts.append(Component([group[i] for i in part.members], part.hub, part.vector))
    return parts, connect([part.vector for part in parts], [part.hub for part in parts], tau)


def third_step(x: Tensor, groups: list[list[int]], tau: float) -> dict[int, tuple[Tensor, bool]]:
    """By the token at whose position it is read: the merged token, and whether it is that token, unchanged."""
    parts, wholes = two_steps(x, groups, tau)
    order = sum(groups, [])
    means = F.normalize(torch.stack([whole.vector for whole in wholes]), dim=-1)
    joined: dict[int, list[int]] = {w: [] for w in range(len(wholes))}
    for i in order:
        joined[int((means @ x[i]).argmax())].append(i)
    found = {}
    for w, whole in enumerate(wholes):
        members = sum((parts[p].members for p in whole.members), [])
        total = torch.stack([whole.vector, *(x[i] for i in joined[w])]).sum(0)
        found[order[whole.hub]] = total / (len(joined[w]) + 1), members == joined[w] and len(members) == 1
    return found


def thresholds(x: Tensor, groups: list[list[int]]) -> list[float]:
    """Cosines at which two components of step 1 become one, the largest first (Kruskal)."""
    unit, found = F.normalize(x, dim=-1), []
    for group in groups:
        of = {i: i for i in group}
        pairs = [(float(unit[i] @ unit[j]), i, j) for i in group for j in group if i < j]
        for cosine, i, j in sorted(pairs, reverse=True):
            if of[i] != of[j]:
                found.append(cosine)
                of = {k: of[j] if root == of[i] else root for k, root in of.items()}
    return sorted(found, reverse=True)


def searched(x: Tensor, groups: list[list[int]], budget: int) -> tuple[float, int]:
    """tau for a budget as docs/method.md says it is searched, and the most components of any tau that fits."""
    n, edges = sum(map(len, groups)), thresholds(x, groups)
    most = min(n, max(-(-3 * budget // 2), len(groups)))

    def tau(parts: int) -> float:
        return edges[n - parts - 1] - 1e-9 if parts < n else 2.0

    counts = {parts: len(two_steps(x, groups, tau(parts))[1]) for parts in range(min(budget, most), most + 1)}
    low, high = min(budget, most), most + 1
    best = low
    for _ in range(4):
        guess = low + min(max(budget - counts[low], 1), (high - low) // 2)
        low, high = (guess, high) if counts[guess] <= budget else (low, guess)
        best = max(best, low, key=counts.__getitem__)
    return tau(best), max(count for count in counts.values() if count <= budget)


def groups_of(features: VisionFeatures, sample: int, scope: str) -> list[list[int]]:
    """Valid tokens by view, views and tokens in reading order."""
    layout, valid = features.layout, features.valid_BN[sample].tolist()
    order = [i for i in layout.order_N.tolist() if valid[i]]
    if scope == "global":
        return [order]
    views = list(dict.fromkeys(layout.view_N[layout.order_N].tolist()))
    return [[i for i in order if layout.view_N[i] == view] for view in views]


def assert_same(chosen: Any, features: VisionFeatures, sample: int, expected: dict[int, tuple[Tensor, bool]]) -> None:
    """Order, positions, boxes, index -1 and source of merged tokens, and the tokens."""
    used = chosen.mask_BT[sample]
    hubs = sorted(expected, key=lambda i: int(features.layout.rank_N[i]))
    assert int(used.sum()) == len(hubs) and bool(used[: len(hubs)].all())
    for slot, hub in enumerate(hubs):
        token, is_kept = expected[hub]
        torch.testing.assert_close(chosen.tokens_BTD[sample, slot].double(), token, rtol=0, atol=1e-5)
        assert torch.equal(chosen.box_BT4[sample, slot], features.box_BN4()[sample, hub])
        assert int(chosen.index_BT[sample, slot]) == (hub if is_kept else -1)
        assert int(chosen.source_BT[sample, slot]) == (Source.KEPT if is_kept else Source.MERGED)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_given_threshold_merges_what_the_loops_merge(grid: tuple[int, int], scope: str, share: float) -> None:
    """A threshold that cuts this share of the edges of one picture's trees."""
    features = pictures(grid)
    edges = thresholds(features.tokens_BND[1].double(), groups_of(features, 1, scope))
    tau = edges[int((1 - share) * len(edges))] - 1e-4
    chosen = LlavaScissor(budget=5000, scope=scope, tau=tau)(features)
    assert chosen.mask_BT.shape[1] == features.layout.n_tokens
    kinds = set()
    for sample in range(len(features.ids)):
        groups = groups_of(features, sample, scope)
        expected = third_step(features.tokens_BND[sample].double(), groups, tau)
        assert_same(chosen, features, sample, expected)
        kinds |= {is_kept for _, is_kept in expected.values()}
    assert kinds == {True, False} if share > 0.5 else False in kinds


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [12, 31])
def test_a_budget_is_met_by_the_threshold_of_the_loops(grid: tuple[int, int], scope: str, budget: int) -> None:
    features = pictures(grid)
    chosen = LlavaScissor(budget=budget, scope=scope)(features)
    for sample in range(len(features.ids)):
        x, groups = features.tokens_BND[sample].double(), groups_of(features, sample, scope)
        tau, best = searched(x, groups, budget)
        expected = third_step(x, groups, tau)
        assert_same(chosen, features, sample, expected)
        assert best - 3 <= len(expected) <= budget, "nearly as many as any threshold gives"


def test_a_threshold_is_lowered_only_where_the_budget_asks_for_it() -> None:
    features = pictures((2, 2))
    counts = {tau: LlavaScissor(budget=5000, tau=tau)(features).mask_BT.sum(-1).tolist() for tau in (0.5, 0.9)}
    for tau, free in counts.items():
        limited = LlavaScissor(budget=40, tau=tau)(features).mask_BT.sum(-1).tolist()
        lowered = LlavaScissor(budget=40)(features).mask_BT.sum(-1).tolist()
        for a, b, c in zip(limited, free, lowered, strict=True):
            assert a == b if b <= 40 else c - 3 <= a <= 40
    assert max(counts[0.5]) <= 40 < min(counts[0.9])


def test_encoder_states_are_compared_and_averaged_before_the_projector() -> None:
    assert (LlavaScissor(budget=3).stage, LlavaScissor(budget=3, space="encoder").stage) == ("post", "pre")


def test_copies_become_one_and_an_unlike_token_stays() -> None:
    tokens = torch.ones(1, 16, 8)
    tokens[0, 5] = torch.eye(8)[0] - torch.eye(8)[1]
    features = make_features((0, 0), side=4, sizes=[(90, 90)], tokens=tokens)
    chosen = LlavaScissor(budget=4, tau=0.95)(features)
    assert chosen.mask_BT.tolist() == [[True, True, False, False]]
    assert chosen.index_BT[0, :2].tolist() == [-1, 5]
    torch.testing.assert_close(chosen.tokens_BTD[0, 0], torch.ones(8))


def test_gradient_of_a_merged_token_reaches_its_tokens() -> None:
    features = pictures((0, 0))
    x = features.tokens_BND.clone().requires_grad_()
    chosen = LlavaScissor(budget=9)(replace(features, tokens_BND=x))
    merged = chosen.source_BT == int(Source.MERGED)
    (grad,) = torch.autograd.grad(chosen.tokens_BTD[merged].sum(), x)
    assert bool((grad[features.valid_BN].abs().sum(-1) > 0).float().mean() > 0.5)
    assert bool((grad[~features.valid_BN] == 0).all())


def test_a_tree_holds_the_components_of_every_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(3, 20, 20, generator=generator)
    similarity = torch.maximum(similarity, similarity.transpose(1, 2))
    parent, weight = spanning_tree(similarity)
    for tau in (0.0, 0.8, 0.9, 0.95, 1.0):
        found = cut(parent, weight, torch.full((3,), tau))
        expected = components(similarity > tau)
        assert torch.equal(found[:, :, None] == found[:, None], expected[:, :, None] == expected[:, None]), tau


@pytest.mark.parametrize("nodes", [1, 2, 33])
@pytest.mark.parametrize("seed", range(8))
def test_components_are_those_of_a_walk(nodes: int, seed: int) -> None:
    """Of chains with shuffled numbers, the case of the most rounds, and of sparse random graphs."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 2:
        near = torch.rand(nodes, nodes, generator=generator) < 1.2 / nodes
    else:
        order, near = torch.randperm(nodes, generator=generator), torch.zeros(nodes, nodes, dtype=torch.bool)
        near[order[:-1], order[1:]] = torch.arange(1, nodes) % 11 != 0
    near = near | near.T
    reach = near | torch.eye(nodes, dtype=torch.bool)
    for _ in range(nodes):
        reach = (reach.float() @ reach.float()) > 0
    (found,) = components(near[None])
    assert torch.equal(found[:, None] == found, reach)
    assert torch.equal(found[found], found)


def test_rows_are_summed_alike_on_a_gpu_and_on_a_cpu() -> None:
    """The product with a 0-1 matrix, which a GPU takes, against adding row by row."""
    generator = torch.Generator().manual_seed(0)
    values, slot = torch.randn(2, 30, 5, generator=generator), torch.randint(0, 7, (2, 30), generator=generator)
    product = linkage.is_slot(slot, 8).float() @ values
    torch.testing.assert_close(sum_rows(values, slot, 8), product, rtol=0, atol=1e-5)


def test_more_thresholds_find_hardly_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    features = pictures((2, 2))
    few = LlavaScissor(budget=31)(features).mask_BT.sum(-1)
    monkeypatch.setattr(llava_scissor, "STEPS", 12)
    many = LlavaScissor(budget=31)(features).mask_BT.sum(-1)
    assert bool((many >= few).all()) and bool((many - few <= 3).all())
