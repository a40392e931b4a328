"""Selectors written as loops over tokens: slow, easy to check by eye, and what the fast code must equal.

What the benches time as well is in experiments/bench/reference.py.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.reference import neighbour_distance, neighbours, valid_tokens, zscore
from shirg import Role, Selection, Selector, ShirgSelector, Source, TokenLayout, VisionFeatures
from shirg.layouts import layout_tables


def kept(chosen: Selection, sample: int = 0) -> list[int]:
    """The source tokens that one picture keeps."""
    used = chosen.mask_BT[sample] & (chosen.source_BT[sample] == int(Source.KEPT))
    index: list[int] = chosen.index_BT[sample][used].tolist()
    return index


def distances(features: VisionFeatures, sample: int, metric: str) -> dict[int, float]:
    """The neighbour term of each valid token of views that do not overlap."""
    x = F.normalize(features.tokens_BND[sample].float(), dim=-1)
    cells = features.layout.cell_N2.double()
    found = {}
    for role in (Role.GLOBAL, Role.TILE):
        token_at = valid_tokens(features, sample, role)
        for cell, i in token_at.items():
            around = neighbours(token_at, cell)
            if metric == "local_var":
                found[i] = float((x[i] - x[[i, *around]].mean(0)).square().mean())
            elif metric == "feature_l2" or not around:
                found[i] = neighbour_distance(x, token_at, cell)
            elif metric == "feature_cos":
                found[i] = float((1 - x[around] @ x[i]).mean())
            else:
                found[i] = float((cells[around] - cells[i]).norm(dim=-1).mean())
    return found


def zscore_by_view(values: Mapping[int, float], view_N: Tensor) -> dict[int, float]:
    """z-scores of tokens, by the statistics of their own view."""
    found: dict[int, float] = {}
    for view in view_N.unique().tolist():
        members = {i: value for i, value in values.items() if view_N[i] == view}
        found |= zscore(members) if members else {}
    return found


def edges(features: VisionFeatures, sample: int) -> list[float]:
    """The edge term of each token, each view by itself."""
    layout, x = features.layout, F.normalize(features.tokens_BND[sample].double(), dim=-1)
    at = {(int(v), *c): i for i, (v, c) in enumerate(zip(layout.view_N, layout.cell_N2.tolist(), strict=True))}
    valid = features.valid_BN[sample]
    values = []
    for i, (view, (row, col)) in enumerate(zip(layout.view_N.tolist(), layout.cell_N2.tolist(), strict=True)):
        total = torch.zeros_like(x[0])
        for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            j = at.get((view, row + step[0], col + step[1]))
            if j is not None and valid[i] and valid[j]:
                total += x[i] - x[j]
        values.append(float(total.abs().mean()))
    return values


def best_tokens(selector: Selector, features: VisionFeatures, score: list[float], sample: int, k: int) -> list[int]:
    """The k tokens to keep by rank: representatives, then the others by score, then those that only fill up."""
    layout = features.layout
    rank, role = layout.rank_N.tolist(), layout.role_N.tolist()
    valid = [i for i in range(layout.n_tokens) if features.valid_BN[sample, i]]

    def ordered(tokens: list[int]) -> list[int]:
        return sorted(tokens, key=lambda i: (-score[i], rank[i]))

    if not isinstance(selector, ShirgSelector):
        return ordered(valid)[:k]
    assigned = [i for i in valid if not layout.overlaps or i == assigned_token(features, sample, i, valid, selector)]
    tiles_only = selector.options.views == "tiles" and layout.canvas != (0, 0)
    competing = [i for i in assigned if not tiles_only or role[i] != int(Role.GLOBAL)]
    best: dict[tuple[int, ...], int] = {}
    for i in ordered(competing) if selector.options.coverage else []:
        best.setdefault(region_of(layout, i, selector.options.coverage), i)
    first = list(best.values()) + evidence(selector, ordered(competing), score, k)
    order = layout_tables(layout).even_P[layout_tables(layout).grid_cell_N].tolist()
    context = sorted([i for i in competing if i not in first], key=lambda i: order[i])
    tiers = [first, context if selector.options.allocation.mode == "evidence_context" else ordered(context)]
    tiers += [ordered([i for i in assigned if i not in competing]), ordered([i for i in valid if i not in assigned])]
    return sum(tiers, [])[:k]


def evidence(selector: ShirgSelector, ranked: list[int], score: list[float], k: int) -> list[int]:
    """The tokens that allocation.mode=evidence_context takes by score: half of k, or fewer that hold `mass`."""
    allocation = selector.options.allocation
    if allocation.mode == "ranked":
        return []
    assert allocation.evidence == 0.5
    chosen = ranked[: (k + 1) // 2]
    if allocation.mass is not None:
        share = [math.exp(score[i] - score[ranked[0]]) for i in ranked]
        enough = [n for n in range(1, len(ranked)) if sum(share[:n]) >= allocation.mass * sum(share)]
        chosen = chosen[: min(enough, default=len(ranked))]
    return chosen


def assigned_token(features: VisionFeatures, sample: int, token: int, valid: list[int], selector: ShirgSelector) -> int:
    """The token of a token's cell: the most relevant, then the one deepest in its crop, then that of the first crop."""
    layout, r = features.layout, features.relevance_BN
    assert r is not None and selector.options.dedup == "relevance"
    cells, views = layout.cell_N2.tolist(), layout.view_N.tolist()
    origin = {v: layout.cell_N2[layout.view_N == v].amin(0).tolist() for v in set(views)}

    def depth(i: int) -> int:
        inside = [cell - start for cell, start in zip(cells[i], origin[views[i]], strict=True)]
        return min(min(x, layout.side - 1 - x) for x in inside)

    others = [i for i in valid if cells[i] == cells[token]]
    return min(others, key=lambda i: (-float(r[sample, i]), -depth(i), views[i]))


def region_of(layout: TokenLayout, token: int, cells: int) -> tuple[int, ...]:
    """The block of cells that a token lies in. Blocks begin anew in each view; where views overlap, on the canvas."""
    row, col = layout.cell_N2[token].tolist()
    if layout.overlaps:
        return row // cells, col // cells
    side = layout.side
    view: tuple[Any, ...] = (int(layout.role_N[token]), row // side, col // side)
    return *view, row % side // cells, col % side // cells


Pick = Callable[[int, list[int], int], list[int]]
"""(sample, valid tokens of a group in reading order, how many are kept) -> those that are kept."""


def in_groups(features: VisionFeatures, scope: str, budget: int, pick: Pick) -> list[list[int]]:
    """The tokens that each picture keeps, in reading order, when `pick` works on each group by itself."""
    layout = features.layout
    order = layout.order_N.tolist()
    views = list(dict.fromkeys(layout.view_N[order].tolist()))
    groups = [[i for i in order if layout.view_N[i] == v] for v in views] if scope == "per_view" else [order]
    kept = []
    for sample in range(len(features.ids)):
        valid = [[i for i in group if features.valid_BN[sample, i]] for group in groups]
        total, seen, chosen = sum(map(len, valid)), 0, []
        for group in valid:
            quota = budget * (seen + len(group)) // total - budget * seen // total
            seen += len(group)
            chosen += pick(sample, group, quota)
        kept.append(sorted(chosen, key=order.index))
    return kept


def keys_of(features: VisionFeatures, tap: str, sample: int) -> Tensor:
    return F.normalize(features.taps[tap][sample].double().mean(-2), dim=-1)


def cosines_of_keys(features: VisionFeatures, tap: str, sample: int) -> list[list[float]]:
    k = keys_of(features, tap, sample)
    return (k @ k.T).tolist()


def cosines(features: VisionFeatures, sample: int) -> Tensor:
    x = F.normalize(features.tokens_BND[sample].double(), dim=-1)
    return x @ x.T


def saint(features: VisionFeatures, rho: float, tap: str, schedule: str) -> Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        cosine, left = cosines_of_keys(features, tap, sample), list(group)
        drops = saint_drops(len(group), quota, rho, schedule)
        for drop in drops:
            degree = {i: sum(cosine[i][j] for j in left) for i in left}
            worst = sorted(reversed(left), key=lambda i: -degree[i])[:drop]
            left = [i for i in left if i not in worst]
        return left

    return pick


def saint_drops(n: int, quota: int, rho: float, schedule: str) -> list[int]:
    """How many tokens each round drops. The divisor begins as 1 / rho and becomes the last round's drop."""
    drops, divisor = list[int](), 1 / rho
    while n > quota:
        drop = max(1, math.floor(n / divisor)) if schedule == "alternating" else math.ceil(rho * n)
        divisor = drop
        drops.append(min(drop, n - quota))
        n -= drops[-1]
    return drops


def saint_vote(features: VisionFeatures, tau: float, step: float, votes: int, gamma: float, tap: str) -> Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        cosine, left, threshold = cosines_of_keys(features, tap, sample), list(group), tau
        while len(left) > quota:
            even, odd = left[0::2], left[1::2]
            scored = []
            for a in even:
                sims = [cosine[a][b] for b in odd]
                voters = [s for s in sims if s >= threshold]
                score = sum(sims) / max(len(sims), 1)
                if voters:
                    score = len(voters) * math.exp(gamma * (sum(voters) / len(voters) - threshold))
                scored.append((a, len(voters), score))
            drop = min(sum(c >= min(votes, len(odd)) for _, c, _ in scored), len(left) - quota)
            worst = [a for a, _, _ in sorted(reversed(scored), key=lambda entry: -entry[2])[:drop]]
            left = [i for i in left if i not in worst]
            threshold -= step
        return left

    return pick


def divprune(features: VisionFeatures) -> Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        apart, chosen = (1 - cosines(features, sample)).tolist(), list[int]()
        while len(chosen) < quota:
            others = chosen or group
            free = [i for i in group if i not in chosen]
            chosen.append(max(free, key=lambda i: min(apart[i][j] for j in others if j != i)))
        return chosen

    return pick


def cdpruner(features: VisionFeatures, sign: int) -> Pick:
    """By determinants: the pick that makes the kernel's minor largest, which is what the factorisation is for."""
    assert features.relevance_BN is not None
    r_BN = sign * features.relevance_BN.double()

    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        valid = r_BN[sample][features.valid_BN[sample]]
        r = (r_BN[sample] - valid.min() + 1e-6) / (valid.max() - valid.min())
        kernel = r[:, None] * cosines(features, sample) * r
        chosen = list[int]()
        while len(chosen) < quota:
            free = [i for i in group if i not in chosen]
            chosen.append(max(free, key=lambda i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
        return chosen

    return pick


def cdpruner_picks(features: VisionFeatures, k: int) -> tuple[list[int], list[float]]:
    """The first picture's picks in float64, each with what the earlier picks leave of its own kernel entry.

    The remainder is the Schur complement of the picks' minor, computed anew for each pick.
    """
    assert features.relevance_BN is not None
    r = features.relevance_BN[0].double()
    r = (r - r.min() + 1e-6) / (r.max() - r.min())
    kernel = r[:, None] * cosines(features, 0) * r
    picks, remainders = list[int](), list[float]()
    for _ in range(k):
        left = kernel.diagonal().clone()
        if picks:
            across = kernel[picks]
            left -= (across * torch.linalg.solve(across[:, picks], across)).sum(0)
        left[picks] = -1
        picks.append(int(left.argmax()))
        remainders.append(float(left.max()))
    return picks, remainders


def vispruner(features: VisionFeatures, important: Fraction, drop: int, tap: str, order: str) -> Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        attention, cosine = features.taps[tap][sample].tolist(), cosines(features, sample).tolist()
        ranked = sorted(group, key=lambda i: -attention[i])
        seen = ranked[: math.floor(important * quota)]
        left = [i for i in (ranked if order == "official" else group) if i not in seen]
        while len(left) > quota - len(seen):
            even, odd = left[0::2], left[1::2]
            closest = {a: max((cosine[a][b] for b in odd), default=0.0) for a in even}
            by_cosine = sorted(reversed(even), key=lambda a: -closest[a])
            left = after_round(left, by_cosine, min(drop, len(left) - quota + len(seen)), order)
        return seen + left

    return pick


def after_round(left: list[int], ranked_even: list[int], count: int, order: str) -> list[int]:
    """The list between two rounds that drop the first `count` of the even tokens by rank."""
    if order == "official":
        return ranked_even[count:] + left[1::2]
    return [i for i in left if i not in ranked_even[:count]]


def tome(features: VisionFeatures, r: int, tap: str, order: str, members: list[dict[int, list[int]]]) -> Pick:
    """Writes which tokens were merged into which to `members`, one dictionary per picture."""

    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        keys = features.taps[tap][sample].double().mean(-2)
        left, of = list(group), {i: [i] for i in group}
        while len(left) > quota:
            even, odd = left[0::2], left[1::2]
            mean = F.normalize(torch.stack([keys[of[i]].mean(0) for i in left]), dim=-1)
            rows = (mean[0::2] @ mean[1::2].T).tolist()
            cosine = {a: dict(zip(odd, row, strict=True)) for a, row in zip(even, rows, strict=True)}
            best = {a: max(odd, key=cosine[a].__getitem__) for a in even}
            near = {a: cosine[a][best[a]] for a in even}
            ranked = sorted(reversed(even), key=lambda a: -near[a])
            count = min(r, len(left) - quota, len(odd))
            for a in ranked[:count]:
                of[best[a]] = of[best[a]] + of.pop(a)
            left = after_round(left, ranked, count, order)
        members[sample].update(of)
        return left

    return pick


def visionzip(
    features: VisionFeatures, share: Fraction, layer: str, spacing: str, members: list[dict[int, list[int]]]
) -> Pick:
    """Writes which tokens were merged into which target to `members`, one dictionary per picture."""

    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        attention = features.taps[f"attention@{layer}"][sample].tolist()
        cosine = cosines_of_keys(features, f"keys@{layer}", sample)
        n_merged = math.ceil(share * quota)
        dominant = sorted(group, key=lambda i: -attention[i])[: quota - n_merged]
        rest = [i for i in group if i not in dominant]
        targets = rest[:: max(1, len(rest) // max(n_merged, 1))][:n_merged]
        if spacing == "centres":
            targets = evenly(rest, n_merged)
        members[sample] |= {t: [] for t in targets}
        for i in (i for i in rest if i not in targets):
            if targets:
                members[sample][max(targets, key=lambda t, i=i: cosine[i][t])].append(i)
        return dominant + targets

    return pick


def evenly(positions: list[int], count: int) -> list[int]:
    total = len(positions)
    return [
        p
        for n, p in enumerate(positions, 1)
        if (2 * n * count + total) // (2 * total) > (2 * (n - 1) * count + total) // (2 * total)
    ]
