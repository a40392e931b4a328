"""Intervals for means and paired differences. Deterministic: every generator is seeded with a constant.

Several questions about one picture are not independent observations, so pictures are what is resampled.
Wilson (1927), "Probable inference, the law of succession, and statistical inference"; Field and Welsh (2007),
"Bootstrapping clustered data"; Hesterberg (2015), "What teachers should know about the bootstrap".
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

from shirg import UserError

ALPHA = 0.05
POWER = 0.8
FLIPS = 10_000
"""Sign assignments drawn by the sign test."""
Clusters = Sequence[Hashable] | np.ndarray
"""Each value's cluster; integers where it is an array."""
Z95 = float(ndtri(0.975))
RESAMPLES = 4000
BLOCK = 500
"""Resamples drawn at a time where there are few clusters."""
BLOCK_NUMBERS = 2**18
"""Random numbers held at a time: with many clusters fewer resamples are drawn at once, from the same stream."""


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
    # Exactly 0 and 1 at the ends, without the rounding error of the formula.
    return (0.0 if successes <= 0 else centre - half, 1.0 if successes >= n else centre + half)


def estimate(scores: Sequence[float] | np.ndarray, clusters: Clusters | None = None) -> Estimate:
    """The mean of scores in [0, 1] and its 95 % interval.

    Wilson for scores of 0 or 1 of unrelated samples; the bootstrap over clusters otherwise. The bootstrap has nothing
    to resample where all scores are equal or of one cluster: then Wilson, with the number of clusters as the number of
    observations.
    """
    if not len(scores):
        raise UserError("no scores: an empty set has no mean")
    values = np.asarray(scores, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    groups = np.arange(n) if clusters is None else numbered(clusters)
    n_clusters = int(groups.max()) + 1
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


def cluster_bootstrap(values: np.ndarray, clusters: Clusters, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean when whole clusters, at least two, are drawn with replacement.

    Percentiles, slightly further out than 2.5 and 97.5 %: with few clusters the plain ones are too narrow (Hesterberg's
    expanded percentiles: as wide as Student's t interval). Clusters of equal total and size are drawn together, as
    counts of a multinomial: the same distribution, and fast where scores are 0 or 1.
    """
    pairs, members = np.unique(np.stack(totals(values, clusters), axis=1), axis=0, return_counts=True)
    n = int(members.sum())
    generator = np.random.default_rng(seed)
    draws = np.concatenate(
        [generator.multinomial(n, members / n, size=size) @ pairs for size in _blocks(RESAMPLES, len(members))]
    )
    tail = float(ndtr(-stdtrit(n - 1, 0.975) * math.sqrt(n / (n - 1))))
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (tail, 1 - tail))
    return (float(low), float(high))


def _blocks(n_draws: int, width: int) -> list[int]:
    """How many of the draws, each of `width` random numbers, are made at a time. Only memory depends on it."""
    size = max(1, min(BLOCK, BLOCK_NUMBERS // width))
    return [min(size, n_draws - start) for start in range(0, n_draws, size)]


def totals(values: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of them, cluster by cluster."""
    member = numbered(clusters)
    return np.bincount(member, weights=values), np.bincount(member)


def numbered(clusters: Clusters) -> np.ndarray:
    """The clusters as numbers from 0 on, in the order of their first members."""
    names = clusters if isinstance(clusters, np.ndarray) else pd.Series(clusters, dtype=object)
    return pd.factorize(names, use_na_sentinel=False)[0]


@dataclass(frozen=True)
class Spread:
    """The mean over seeds and samples, its 95 % interval, and the standard deviation of the seeds' own means."""

    n: int
    seeds: int
    mean: float
    low: float
    high: float
    between: float
    p: float
    """Two-sided, for the hypothesis that the mean is zero; meant for differences."""


def over_seeds(scores_SN: np.ndarray, clusters: Sequence[Hashable], lowest: float = -1.0) -> Spread:
    """The mean of a table of seeds by samples, for a new seed and a new picture alike.

    Args:
        scores_SN: at least two seeds, at least two clusters.
        clusters: each sample's picture.
        lowest: least possible value, 0 for scores and -1 for differences; the interval stays above, and below 1.
    """
    n_seeds, n = scores_SN.shape
    sums_SK = np.stack([totals(row, clusters)[0] for row in scores_SN])
    sizes_K = totals(scores_SN[0], clusters)[1]
    n_clusters = len(sizes_K)
    if n_seeds < 2 or n_clusters < 2:
        raise UserError(f"{n_seeds} seeds on {n_clusters} pictures: a spread needs at least two of each")
    mean_S = scores_SN.mean(axis=1)
    # Pictures with more questions weigh more: each picture's deviation from its seed's mean, by its share.
    cells_SK = mean_S[:, None] + (sums_SK - mean_S[:, None] * sizes_K) / sizes_K.mean()
    mean, mean_K = float(cells_SK.mean()), cells_SK.mean(axis=0)
    square_seeds = n_clusters * float(((mean_S - mean) ** 2).sum()) / (n_seeds - 1)
    square_pictures = n_seeds * float(((mean_K - mean) ** 2).sum()) / (n_clusters - 1)
    rest_SK = cells_SK - mean_S[:, None] - mean_K + mean
    square_rest = float((rest_SK**2).sum()) / ((n_seeds - 1) * (n_clusters - 1))
    # The sum of mean squares is at least each of its parts, because variances are not negative.
    square = max(square_seeds + square_pictures - square_rest, square_seeds, square_pictures)
    error = math.sqrt(square / (n_seeds * n_clusters))
    between = float(mean_S.std(ddof=1))
    if error == 0:
        # Nothing varies, neither seeds nor pictures: as wide as Wilson's interval for an event never seen.
        unseen = wilson(0, n_clusters)[1]
        p = 1.0 if mean == 0 else 0.0
        return Spread(n, n_seeds, mean, max(lowest, mean - unseen), min(1.0, mean + unseen), between, p)
    freedom = square**2 / (
        square_seeds**2 / (n_seeds - 1)
        + square_pictures**2 / (n_clusters - 1)
        + square_rest**2 / ((n_seeds - 1) * (n_clusters - 1))
    )
    freedom = max(1.0, freedom)
    half = float(stdtrit(freedom, 0.975)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Spread(n, n_seeds, mean, max(lowest, mean - half), min(1.0, mean + half), between, p)


def sign_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the sign test, from one total difference for each picture.

    Hypothesis: each difference could equally have had the other sign. With one question of score 0 or 1 for each
    picture this is McNemar's exact test; otherwise signs are drawn at random, and the observed ones are counted too.
    """
    # Sums of scores such as 0.1 + 0.2 must be equal when they are meant to be.
    values = np.round(np.asarray(differences, dtype=np.float64), 9)
    values = values[values != 0]
    if not len(values):
        return 1.0
    sizes, counts = np.unique(np.abs(values), return_counts=True)
    if len(sizes) == 1:
        fewer = min(int((values > 0).sum()), int((values < 0).sum()))
        return min(1.0, 2 * float(bdtr(fewer, len(values), 0.5)))
    generator, least = np.random.default_rng(0), abs(values.sum()) - 1e-6
    as_far = 0
    for n_flips in _blocks(FLIPS, len(counts)):
        sums = (2 * generator.binomial(counts, 0.5, size=(n_flips, len(counts))) - counts) @ sizes
        as_far += int((np.abs(sums) >= least).sum())
    return (as_far + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: those below alpha contain any false alarm with a probability of at most alpha."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def detectable(low: float, high: float) -> float:
    """The smallest true difference that a comparison with such a 95 % interval finds with 80 % power."""
    return (high - low) / 2 * (1 + float(ndtri(POWER)) / float(ndtri(1 - ALPHA / 2)))


def stars(p: float) -> str:
    """`*` for a p below 0.05, nothing otherwise."""
    return "*" if not math.isnan(p) and p < ALPHA else ""
