"""Intervals for means and paired differences. Deterministic: the bootstrap's generator is seeded with a constant.

Several questions about one picture are not independent observations, so pictures are what is resampled.
Wilson (1927), "Probable inference, the law of succession, and statistical inference"; Field and Welsh (2007),
"Bootstrapping clustered data".
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean of n scores with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


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
    equal leave the bootstrap nothing to resample: then Wilson, with the clusters as the number of observations.
    """
    if not scores:
        raise ValueError("no scores: an empty set has no mean")
    values = np.asarray(scores, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    groups = list(range(n)) if clusters is None else list(clusters)
    n_clusters = len(set(groups))
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if bool((values == values[0]).all()) or (binary and n_clusters == n):
        low, high = wilson(mean * n_clusters, n_clusters)
        return Estimate(n, mean, min(low, mean), max(high, mean))
    low, high = cluster_bootstrap(values, groups)
    return Estimate(n, mean, low, high)


def paired_delta(
    scores: Mapping[str, float], baseline: Mapping[str, float], clusters: Mapping[str, Hashable] | None = None
) -> Estimate | None:
    """Mean of score - baseline over the ids that both answered, with its 95 % interval; None without common ids.

    Where no difference varies, the interval is as wide as Wilson's for an event never seen in that many clusters.
    """
    ids = sorted(scores.keys() & baseline.keys())
    if not ids:
        return None
    difference = np.asarray([scores[i] - baseline[i] for i in ids], dtype=np.float64)
    groups = [clusters[i] if clusters else i for i in ids]
    mean = float(difference.mean())
    if bool((difference == difference[0]).all()):
        unseen = wilson(0, len(set(groups)))[1]
        return Estimate(len(ids), mean, max(-1.0, mean - unseen), min(1.0, mean + unseen))
    return Estimate(len(ids), mean, *cluster_bootstrap(difference, groups))


def cluster_bootstrap(values: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean when whole clusters are drawn with replacement."""
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.asarray([number[cluster] for cluster in clusters])
    total = np.bincount(member, weights=values, minlength=len(number))
    count = np.bincount(member, minlength=len(number))
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        draw = generator.integers(len(number), size=len(number))
        means[i] = total[draw].sum() / count[draw].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return (float(low), float(high))
