"""Intervals and p values, against numbers worked out by hand and against every possible outcome."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy.special import stdtrit

from experiments.analysis import stats
from experiments.analysis.stats import (
    RESAMPLES,
    cluster_bootstrap,
    detectable,
    estimate,
    holm,
    over_seeds,
    paired_delta,
    sign_test,
    stars,
    wilson,
)


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


def test_one_question_for_each_picture_is_mcnemars_exact_test() -> None:
    # 8 wins, 2 losses, ties do not count: 2 (1 + 10 + 45) / 2^10
    assert sign_test([1.0] * 8 + [-1.0] * 2 + [0.0] * 30) == pytest.approx(112 / 1024)
    assert sign_test([-1.0] * 5) == pytest.approx(2 / 32)
    assert sign_test([1.0, -1.0]) == 1.0
    assert sign_test([0.0, 0.0]) == sign_test([]) == 1.0


def test_pictures_with_several_questions_are_flipped_as_a_whole() -> None:
    differences = [3.0, 2.0, 2.0, -1.0, 1.0, 0.4, 1.0, -0.2]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=8)
    ]
    exact = sum(abs(total) >= abs(sum(differences)) - 1e-9 for total in sums) / len(sums)
    assert sign_test(differences) == pytest.approx(exact, abs=0.01)
    assert sign_test(differences) == sign_test(differences)


def test_sums_that_differ_by_rounding_alone_are_equal() -> None:
    """0.1 + 0.2 and 0.3: one size of difference, so the exact test, and four wins of four."""
    assert sign_test([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]) == pytest.approx(2 / 16)


def test_a_difference_counts_wins_and_losses_by_answer_and_tests_by_picture() -> None:
    ours = {f"{k}{i}": 1.0 for k in "abcd" for i in range(5)}
    theirs = {i: 0.0 for i in ours}
    got = paired_delta(ours, theirs, {i: i[0] for i in ours})
    assert got is not None
    assert (got.wins, got.losses) == (20, 0)
    assert got.p == pytest.approx(2 / 16), "four pictures, not twenty answers"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_can_be_detected_follows_the_interval() -> None:
    # (1.95996 + 0.84162) / 1.95996 half widths
    assert detectable(-0.1, 0.1) == pytest.approx(0.1 * 2.80158 / 1.95996, abs=1e-5)


def test_one_star_at_five_percent() -> None:
    assert (stars(0.0499), stars(0.05)) == ("*", "")


def test_without_spread_between_seeds_it_is_students_interval_over_pictures() -> None:
    scores = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    got = over_seeds(np.stack([scores, scores, scores]), list("abcdef"))
    half = float(stdtrit(5, 0.975)) * scores.std(ddof=1) / math.sqrt(6)
    assert (got.mean, got.seeds, got.n, got.between) == (pytest.approx(4 / 6), 3, 6, 0.0)
    assert got.high == 1.0 and got.low == pytest.approx(4 / 6 - half)


def test_without_spread_between_pictures_it_is_students_interval_over_seeds() -> None:
    means = np.array([0.2, 0.4, 0.3])
    got = over_seeds(np.repeat(means[:, None], 8, axis=1), list("abcdefgh"))
    half = float(stdtrit(2, 0.975)) * means.std(ddof=1) / math.sqrt(3)
    assert got.mean == pytest.approx(0.3) and got.between == pytest.approx(0.1)
    assert (got.low, got.high) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    # t = 0.3 / (0.1 / sqrt 3) = 5.196 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    assert got.p == pytest.approx(1 - 5.19615 / math.sqrt(29), abs=1e-5)


def test_questions_about_one_picture_are_one_observation() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.normal(size=(4, 1, 30)) + 0.1 * generator.normal(size=(4, 3, 30))
    alone = over_seeds(pictures.mean(axis=1), list(range(30)), -9.0)
    repeated = over_seeds(pictures.reshape(4, -1), list(range(30)) * 3, -9.0)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def test_where_nothing_varies_it_is_not_certain() -> None:
    got = over_seeds(np.ones((3, 40)), list(range(40)), 0.0)
    assert (got.mean, got.high, got.p) == (1.0, 1.0, 0.0)
    assert got.low == pytest.approx(1 - 3.8414588 / 43.8414588)
    with pytest.raises(ValueError, match="1 seeds on 4 pictures"):
        over_seeds(np.ones((1, 4)), list(range(4)))


def test_blocks_of_resamples_give_the_same_numbers_in_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random stream, whether many resamples are drawn at a time or few."""
    rng = np.random.default_rng(3)
    ours, theirs = ({str(i): float(x) for i, x in enumerate(rng.random(3000))} for _ in range(2))
    whole = paired_delta(ours, theirs)
    monkeypatch.setattr(stats, "BLOCK_NUMBERS", 2**14)
    tracemalloc.start()
    few = paired_delta(ours, theirs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole is not None and few is not None
    assert (few.p, few.mean, few.wins) == (whole.p, whole.mean, whole.wins)
    assert (few.low, few.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert peak < 8 * 2**20 < stats.FLIPS * 3000 * 8
