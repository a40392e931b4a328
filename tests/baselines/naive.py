"""Rivals written as loops over tokens, one picture and one view at a time: slow, and easy to check by eye."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg import VisionFeatures

Pick = Callable[[int, list[int], int], list[int]]
"""(sample, valid tokens of a group in reading order, how many stay) -> those that stay."""


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


def saint(features: VisionFeatures, rho: float, tap: str) -> Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        cosine, left = cosines_of_keys(features, tap, sample), list(group)
        while len(left) > quota:
            degree = {i: sum(cosine[i][j] for j in left) for i in left}
            drop = min(len(left) - quota, math.ceil(rho * len(left)))
            worst = sorted(reversed(left), key=lambda i: -degree[i])[:drop]
            left = [i for i in left if i not in worst]
        return left

    return pick


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
        r = (r_BN[sample] - valid.min()) / (valid.max() - valid.min())
        kernel = r[:, None] * cosines(features, sample) * r
        chosen = list[int]()
        while len(chosen) < quota:
            free = [i for i in group if i not in chosen]
            chosen.append(max(free, key=lambda i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
        return chosen

    return pick


def vispruner(features: VisionFeatures, important: float, drop: int, tap: str) -> Pick:
    def pick(sample: int, group: list[int], quota: int) -> list[int]:
        attention, cosine = features.taps[tap][sample].tolist(), cosines(features, sample).tolist()
        seen = sorted(group, key=lambda i: -attention[i])[: math.floor(important * quota)]
        left = [i for i in group if i not in seen]
        while len(left) > quota - len(seen):
            even, odd = left[0::2], left[1::2]
            closest = {a: max((cosine[a][b] for b in odd), default=0.0) for a in even}
            worst = sorted(reversed(even), key=lambda a: -closest[a])[: min(drop, len(left) - quota + len(seen))]
            left = [i for i in left if i not in worst]
        return seen + left

    return pick


def tome(features: VisionFeatures, r: int, tap: str, members: list[dict[int, list[int]]]) -> Pick:
    """Notes who was merged into whom in `members`, one dictionary per picture."""

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
            gone = sorted(reversed(even), key=lambda a: -near[a])[: min(r, len(left) - quota, len(odd))]
            for a in gone:
                of[best[a]] = of[best[a]] + of.pop(a)
            left = [i for i in left if i not in gone]
        members[sample].update(of)
        return left

    return pick


def evenly(places: list[int], count: int) -> list[int]:
    total = len(places)
    return [
        p
        for n, p in enumerate(places, 1)
        if (2 * n * count + total) // (2 * total) > (2 * (n - 1) * count + total) // (2 * total)
    ]
