"""Intervals, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from experiments.analysis.stats import RESAMPLES, cluster_bootstrap, estimate, paired_delta, wilson


def test_wilson_is_the_textbook_interval() -> None:
    # p = 0.8, n = 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.71674,
    # half 1.96 / 1.38416 sqrt(0.016 + 0.009604) = 0.22658
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    # no success in n: z^2 / (n + z^2) = 3.8415 / 103.8415
    assert wilson(0, 100) == pytest.approx((0.0, 0.0369935), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_right_or_wrong_answers_about_different_pictures_get_wilson() -> None:
    got = estimate([1.0] * 8 + [0.0] * 2)
    assert (got.n, got.mean) == (10, 0.8)
    assert (got.low, got.high) == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_pictures_are_resampled_when_questions_share_them() -> None:
    """Four pictures, two all right and two all wrong: the mean of a draw is k/4 with k binomial(4, 1/2)."""
    scores, pictures = [1.0] * 20 + [0.0] * 20, [i // 10 for i in range(40)]
    got = estimate(scores, pictures)
    # P(k = 0) = 1/16 > 0.025, so that both ends of the interval are the extremes.
    assert (got.mean, got.low, got.high) == (0.5, 0.0, 1.0)
    alone = estimate(scores)
    assert alone.high - alone.low < 0.31


def test_the_bootstrap_agrees_with_the_normal_interval_where_both_hold() -> None:
    values = np.random.default_rng(3).normal(0.5, 0.1, size=400)
    low, high = cluster_bootstrap(values, range(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert cluster_bootstrap(values, range(400)) == (low, high)


def test_clusters_weigh_by_their_size() -> None:
    """A cluster of three ones and one of a single zero: draws give 1, 0 or 3/4, not 1/2."""
    values, clusters = np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]
    assert cluster_bootstrap(values, clusters) == (0.0, 1.0)
    assert estimate(list(values), clusters).mean == 0.75
    assert RESAMPLES >= 1000


def test_equal_scores_do_not_pretend_to_certainty() -> None:
    """Sixty right answers about three pictures are three observations: n / (n + z^2) = 3 / 6.8415."""
    got = estimate([1.0] * 60, [i // 20 for i in range(60)])
    assert (got.mean, got.high) == (1.0, 1.0)
    assert got.low == pytest.approx(0.43850, abs=1e-5)


def test_no_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="no scores"):
        estimate([])


def test_paired_delta_uses_the_common_samples_alone() -> None:
    ours = {"a": 1.0, "b": 1.0, "c": 0.0, "only here": 1.0}
    theirs = {"a": 0.0, "b": 1.0, "c": 0.0, "only there": 0.0}
    got = paired_delta(ours, theirs)
    assert got is not None
    assert (got.n, got.mean) == (3, pytest.approx(1 / 3))
    assert (got.low, got.high) == (0.0, 1.0)
    assert paired_delta({"a": 1.0}, {"b": 1.0}) is None


def test_paired_delta_is_narrower_than_two_intervals() -> None:
    """Two systems that differ on 5 of 100 samples, always in the same direction."""
    theirs = {str(i): float(i % 2) for i in range(100)}
    ours = theirs | {str(2 * i): 1.0 for i in range(5)}
    got = paired_delta(ours, theirs)
    assert got is not None
    assert got.mean == pytest.approx(0.05)
    assert 0 < got.low < got.high < 0.11


def test_paired_delta_without_any_difference_is_not_certain() -> None:
    same = {str(i): 1.0 for i in range(100)}
    got = paired_delta(same, same)
    assert got is not None
    assert (got.low, got.mean, got.high) == pytest.approx((-0.0369935, 0.0, 0.0369935), abs=1e-6)
