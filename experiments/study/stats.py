"""Intervals for means and paired differences. Deterministic: every generator is seeded with a constant.

Several questions about one picture are not independent observations, so pictures are what is resampled.
Wilson (1927), "Probable inference, the law of succession, and statistical inference"; Field and Welsh (2007),
"Bootstrapping clustered data"; Hesterberg (2015), "What teachers should know about the bootstrap".
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from experiments.study.significance import sign_test

Z95 = float(ndtri(0.975))
RESAMPLES = 4000
BLOCK = 500
"""Resamples drawn at a time: many different scores need memory for each of them."""


@dataclass(frozen=True)
class Estimate:
    """A mean of n scores with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Delta(Estimate):
    """A mean difference on the same samples; p is two-sided, for the hypothesis that the systems do not differ."""

    wins: int
    losses: int
    p: float


def wilson(successes: float, n: float) -> tuple[float, float]:
    """The 95 % score interval of a proportion."""
    if n <= 0:
        return (0.0, 1.0)
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Exactly 0 and 1 at the ends, where the formula is right but for rounding.
    return (0.0 if successes <= 0 else centre - half, 1.0 if successes >= n else centre + half)


def estimate(scores: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of scores in [0, 1] and its 95 % interval.

    Wilson for right-or-wrong scores of unrelated samples; the bootstrap over clusters otherwise. Scores that are all
    equal, or all of one cluster, leave the bootstrap nothing to resample: then Wilson, with the clusters as the number
    of observations.
    """
    if not scores:
        raise ValueError("no scores: an empty set has no mean")
    values = np.asarray(scores, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    groups = list(range(n)) if clusters is None else list(clusters)
    n_clusters = len(set(groups))
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if n_clusters == 1 or bool((values == values[0]).all()) or (binary and n_clusters == n):
        low, high = wilson(mean * n_clusters, n_clusters)
        return Estimate(n, mean, min(low, mean), max(high, mean))
    low, high = cluster_bootstrap(values, groups)
    return Estimate(n, mean, low, high)


def paired_delta(
    scores: Mapping[str, float], baseline: Mapping[str, float], clusters: Mapping[str, Hashable] | None = None
) -> Delta | None:
    """Mean of score - baseline over the ids that both answered, with its 95 % interval; None without common ids.

    Where no difference varies, the interval is as wide as Wilson's for an event never seen in that many clusters.
    """
    ids = sorted(scores.keys() & baseline.keys())
    if not ids:
        return None
    difference = np.asarray([scores[i] - baseline[i] for i in ids], dtype=np.float64)
    groups = [clusters[i] if clusters else i for i in ids]
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    p = sign_test(totals(difference, groups)[0])
    mean, n_clusters = float(difference.mean()), len(set(groups))
    if n_clusters == 1 or bool((difference == difference[0]).all()):
        unseen = wilson(0, n_clusters)[1]
        return Delta(len(ids), mean, max(-1.0, mean - unseen), min(1.0, mean + unseen), wins, losses, p)
    return Delta(len(ids), mean, *cluster_bootstrap(difference, groups), wins, losses, p)


def cluster_bootstrap(values: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean when whole clusters, at least two, are drawn with replacement.

    Percentiles, taken a little further out so that few clusters are not too sure of themselves (Hesterberg's expanded
    percentiles: as wide as Student's t interval). Clusters of equal total and size are drawn together, as counts of a
    multinomial: the same distribution, and fast where scores are right or wrong.
    """
    pairs, members = np.unique(np.stack(totals(values, clusters), axis=1), axis=0, return_counts=True)
    n = int(members.sum())
    generator = np.random.default_rng(seed)
    blocks = [generator.multinomial(n, members / n, size=BLOCK) @ pairs for _ in range(RESAMPLES // BLOCK)]
    draws = np.concatenate(blocks)
    tail = float(ndtr(-stdtrit(n - 1, 0.975) * math.sqrt(n / (n - 1))))
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (tail, 1 - tail))
    return (float(low), float(high))


def totals(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of them, cluster by cluster."""
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.asarray([number[cluster] for cluster in clusters])
    return np.bincount(member, weights=values), np.bincount(member)
