"""How evenly something is spread over places: the Gini coefficient (docs/report.md, "Statistics of what is kept")."""

from collections.abc import Sequence

import numpy as np


def gini(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> float | None:
    """The Gini coefficient: half the mean absolute difference of two places, as a share of the mean place.

    0 where all values are equal. Everything in one of n places of equal weight gives (n - 1) / n.

    Args:
        values: at least 0, one for each place, per unit of its weight.
        weights: the size of each place; all equal where None.

    Returns:
        None where there is no place, or nothing in any of them.
    """
    value_R = np.asarray(values, dtype=np.float64)
    weight_R = np.ones_like(value_R) if weights is None else np.asarray(weights, dtype=np.float64)
    total = float(weight_R @ value_R)
    if total == 0:
        return None
    difference = weight_R @ np.abs(value_R[:, None] - value_R) @ weight_R
    return float(difference) / (2 * float(weight_R.sum()) * total)
