"""Several trainings of one system: seeds are drawn at random, as pictures are, and both go into the interval.

Every seed answers the same questions, so the scores form a table of seeds by pictures, both random effects. The
variance of its mean comes from the mean squares, with Satterthwaite's degrees of freedom, as for readers by cases in
radiology. From three seeds on, the interval holds what it promises; with two it covers some 91 %.
Satterthwaite (1946), "An approximate distribution of estimates of variance components"; Gallas et al. (2009), "A
framework for random-effects ROC analysis".
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from experiments.study.stats import totals, wilson


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
    """Two-sided, for the hypothesis that the mean is zero; of use for differences."""


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
        raise ValueError(f"{n_seeds} seeds on {n_clusters} pictures: a spread needs at least two of each")
    mean_S = scores_SN.mean(axis=1)
    # Pictures with more questions weigh more: each picture's deviation from its seed's mean, by its share.
    cells_SK = mean_S[:, None] + (sums_SK - mean_S[:, None] * sizes_K) / sizes_K.mean()
    mean, mean_K = float(cells_SK.mean()), cells_SK.mean(axis=0)
    square_seeds = n_clusters * float(((mean_S - mean) ** 2).sum()) / (n_seeds - 1)
    square_pictures = n_seeds * float(((mean_K - mean) ** 2).sum()) / (n_clusters - 1)
    rest_SK = cells_SK - mean_S[:, None] - mean_K + mean
    square_rest = float((rest_SK**2).sum()) / ((n_seeds - 1) * (n_clusters - 1))
    # A sum of mean squares that comes out below one of its parts is that part: variances are not negative.
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
