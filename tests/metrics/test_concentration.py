"""The Gini coefficient, by hand."""

import numpy as np
import pytest

from experiments.metrics.concentration import gini


def test_equal_places_have_none() -> None:
    assert gini([0.3] * 16) == 0.0
    assert gini([5.0]) == 0.0


@pytest.mark.parametrize("n", [2, 16, 49])
def test_all_in_one_place_is_the_most_that_there_is(n: int) -> None:
    assert gini([0.0] * (n - 1) + [7.0]) == pytest.approx((n - 1) / n)


def test_a_hand_computed_example() -> None:
    """1, 2, 3: the six ordered pairs differ by 8 in all; 8 / (2 x 3 places x a total of 6)."""
    assert gini([1.0, 2.0, 3.0]) == pytest.approx(8 / 36)
    assert gini([30.0, 10.0, 20.0]) == pytest.approx(8 / 36), "neither scale nor order counts"


def test_a_place_of_weight_n_is_n_places() -> None:
    values, weights = [0.1, 0.5, 0.0], [3, 1, 2]
    assert gini(values, weights) == pytest.approx(gini(np.repeat(values, weights)))
    assert gini(values, weights) != pytest.approx(gini(values))


def test_nothing_has_no_concentration() -> None:
    assert gini([]) is None and gini([0.0, 0.0]) is None
    assert gini([1.0, 0.0], [0, 4]) is None, "a place of no size holds nothing"
