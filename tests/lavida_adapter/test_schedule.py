"""Schedules as properties, and the examples of the documentation."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lavida_adapter.generate import SCHEDULES, tokens_per_step

masks, steps = st.integers(1, 256), st.integers(1, 256)
shifts = st.floats(1e-4, 1e4)
quick = settings(max_examples=150, deadline=None)


@quick
@given(masks, steps, st.sampled_from(SCHEDULES), shifts)
@example(37, 3, "shift", 4.481116978515434)  # in float32 the last share is a hair below 1
@example(25, 3, "shift", 2.609614246947385)
def test_counts_add_up(n: int, s: int, schedule: str, shift: float) -> None:
    counts = tokens_per_step(n, s, schedule, shift)
    assert sum(counts) == n
    if schedule == "none":
        assert len(counts) == s
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
    else:
        assert len(counts) == min(n, s)
        assert min(counts) >= 1


@quick
@given(masks, steps, shifts, shifts)
def test_a_smaller_shift_commits_earlier(n: int, s: int, one: float, other: float) -> None:
    """At every step, up to the two tokens that rounding and the minimum of one per step move."""
    early, late = (list(accumulate(tokens_per_step(n, s, "shift", a))) for a in sorted((one, other)))
    assert all(e >= at - 2 for e, at in zip(early, late, strict=True))


@quick
@given(masks, steps, st.floats(1e-4, 1.0))
def test_shifts_up_to_one_slow_down(n: int, s: int, shift: float) -> None:
    assert all(after <= before + 2 for before, after in pairwise(tokens_per_step(n, s, "shift", shift)))


@quick
@given(masks, steps)
def test_a_shift_of_one_is_linear_and_linear_is_even(n: int, s: int) -> None:
    counts = tokens_per_step(n, s, "linear")
    assert tokens_per_step(n, s, "shift", 1.0) == counts
    assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize(
    ("shift", "counts"),
    [
        (1 / 3, [6, 4, 4, 2, 3, 2, 2, *[1] * 9]),
        (0.33, [6, 4, 4, 3, 2, 2, 2, *[1] * 9]),
        (3, [*[1] * 8, 2, 2, 2, 2, 3, 4, 4, 5]),
    ],
)
def test_documented_examples(shift: float, counts: list[int]) -> None:
    assert tokens_per_step(32, 16, "shift", shift) == counts


def test_schedules_differ() -> None:
    found = {schedule: tuple(tokens_per_step(32, 8, schedule)) for schedule in SCHEDULES}
    assert found["none"] == found["linear"] == (4,) * 8
    assert len(set(found.values())) == 4


def test_nothing_to_fill() -> None:
    assert [tokens_per_step(0, 5, schedule) for schedule in SCHEDULES] == [[]] * 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((4, 0, "none", 1.0), "0 denoising steps per block; raise step_ratio or step_per_block"),
        ((4, 2, "sine", 1.0), "decode.schedule='sine': choose one of none, shift, cosine, linear, logit_normal"),
        ((4, 2, "shift", 0.0), "decode.shift=0.0: give a positive number"),
        ((4, 2, "shift", -1.0), "decode.shift=-1.0"),
        ((4, 2, "shift", float("nan")), "decode.shift=nan"),
        ((4, 2, "shift", float("inf")), "decode.shift=inf"),
    ],
)
def test_errors(arguments: tuple[int, int, str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tokens_per_step(*arguments)
