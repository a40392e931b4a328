"""Is a difference more than chance, is it after looking at many systems, and what could have been seen at all.

McNemar (1947), "Note on the sampling error of the difference between correlated proportions or percentages"; Holm
(1979), "A simple sequentially rejective multiple test procedure".
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, ndtri

ALPHA = 0.05
POWER = 0.8
FLIPS = 10_000


def sign_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of "either system could have given either answer", from one total difference for each picture.

    Under that hypothesis each difference might as well have had the other sign. One right-or-wrong question for each
    picture makes this McNemar's exact test; otherwise signs are drawn (10,000 times, the observed ones counted in).
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
    flips = np.random.default_rng(0).binomial(counts, 0.5, size=(FLIPS, len(counts)))
    sums = (2 * flips - counts) @ sizes
    as_far = int((np.abs(sums) >= abs(values.sum()) - 1e-6).sum())
    return (as_far + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number: below alpha with at most that chance of any false alarm among them."""
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
    """`*` for a p below 0.05, nothing otherwise: one level, decided beforehand."""
    return "*" if not math.isnan(p) and p < ALPHA else ""
