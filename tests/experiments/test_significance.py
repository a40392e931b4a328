"""P values against numbers worked out by hand and against every possible outcome."""

import itertools

import pytest

from experiments.analysis.stats import detectable, holm, paired_delta, sign_test, stars


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
