"""How many tokens each step commits: sums, order, documented examples, and the published numbers of both samplers."""

import json
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lavida_adapter.schedules import SCHEDULES, drawn_counts, grid_shares, tokens_per_step
from tests.golden_data import golden_dir

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
    if schedule == "time_grid":
        assert len(counts) == s
        assert min(counts) >= 0
    elif schedule == "none":
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
    slowing = tokens_per_step(n, s, "shift", min(one, other, 1.0))
    assert all(after <= before + 2 for before, after in pairwise(slowing))


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
    assert len(set(found.values())) == 5
    assert [tokens_per_step(0, 5, schedule) for schedule in SCHEDULES] == [[]] * len(SCHEDULES)


def test_the_published_numbers_of_named_schedules() -> None:
    cases = json.loads((golden_dir("lavida_dream") / "schedules.json").read_text())
    for case in cases:
        shift = 3.0 if case["shift"] is None else case["shift"]
        assert tokens_per_step(case["mask_count"], case["steps"], case["schedule"], shift) == case["tokens_per_step"]
    assert len(cases) == 70


def test_the_published_numbers_of_the_time_grid() -> None:
    """Those of one row and a whole grid; `test_dream_published` covers the others."""
    cases = json.loads((golden_dir("lavida_dream") / "time_grid.json").read_text())
    whole = [case for case in cases if case["step_ratio"] is None]
    for case in whole:
        steps = min(case["steps"], case["max_new_tokens"])
        counts = tokens_per_step(case["masks_at_start"], steps, "time_grid", eps=case["eps"])
        assert counts == case["tokens_per_step"]
    assert len(whole) == 16


@quick
@given(masks, steps, st.floats(1e-4, 0.9))
def test_a_larger_end_of_the_grid_leaves_more_to_the_last_step(n: int, s: int, eps: float) -> None:
    small, large = (tokens_per_step(n, s, "time_grid", eps=e) for e in (eps / 2, eps))
    assert large[-1] >= small[-1]
    assert all(late <= early for early, late in zip(accumulate(small), accumulate(large), strict=True))


@quick
@given(masks, st.integers(1, 32), st.integers(0, 99))
def test_drawn_counts_add_up_and_repeat(n: int, s: int, seed: int) -> None:
    counts = drawn_counts(n, s, 1e-3, torch.Generator().manual_seed(seed))
    assert sum(counts) == n and len(counts) == s and min(counts) >= 0
    assert counts == drawn_counts(n, s, 1e-3, torch.Generator().manual_seed(seed))


def test_drawn_counts_have_the_mean_of_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([drawn_counts(64, 8, 0.1, generator) for _ in range(400)], dtype=torch.float64)
    left, expected = 64.0, []
    for share in [*grid_shares(8, 0.1).tolist()[:-1], 1.0]:
        expected.append(share * left)
        left -= expected[-1]
    torch.testing.assert_close(drawn.mean(0), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.5)
