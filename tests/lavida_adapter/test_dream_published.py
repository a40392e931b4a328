"""Dream's loop: the default gives what the published one gives, without its idle steps; and what the quirks do."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavida_adapter import DecodeConfig
from lavida_adapter.dream_published import DREAM_SAMPLER
from lavida_adapter.generate import denoise, start
from lavida_adapter.schedules import tokens_per_step
from shirg import UserError
from tests.lavida_adapter.tables import MASK, W, at, dependent

RULES = ("maskgit_plus", "topk_margin", "entropy")


def run(ids_BA: Tensor, seed: int = 0, **knobs: Any) -> tuple[Tensor, int, list[int], list[Tensor]]:
    """Dream's sampler over logits that depend on the whole row."""
    config = DecodeConfig(max_new_tokens=ids_BA.shape[1], keep_history=True, **knobs)
    generator = torch.Generator().manual_seed(seed)
    return denoise(at(lambda ids: dependent(ids, seed)), ids_BA, config, MASK, generator, sampler=DREAM_SAMPLER)


def published(ids_BA: Tensor, seed: int = 0, **knobs: Any) -> tuple[Tensor, int, list[int], list[Tensor]]:
    return run(ids_BA, seed, parity=True, allow_mask_token=True, **knobs)


def blank(n: int, batch: int = 1, first: int | None = None) -> Tensor:
    ids_BA = torch.full((batch, n), MASK)
    if first is not None:
        ids_BA[:, 0] = first
    return ids_BA


def changes(ids_BA: Tensor, history: list[Tensor]) -> list[list[list[int]]]:
    """The answers after the steps that changed something."""
    return [b.tolist() for a, b in pairwise([ids_BA, *history]) if not torch.equal(a, b)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(RULES),
    st.sampled_from([None, 3]),
    st.sampled_from(["none", "shift", "linear"]),
    st.booleans(),
    st.integers(0, 30),
)
def test_the_default_leaves_out_idle_steps_and_nothing_else(
    n: int, steps: int, rule: str, top_k: int | None, schedule: str, prefix: bool, seed: int
) -> None:
    """One row, the likeliest tokens, steps instead of a ratio: all other quirks are silent."""
    ids = blank(n, first=2 if prefix else None)
    n_masks = int((ids == MASK).sum())
    if n_masks == 0:
        return
    knobs = {"step_per_block": min(steps, n_masks), "remasking": rule, "top_k": top_k, "schedule": schedule}
    ours, forwards, taken, history = run(ids, seed, **knobs)
    theirs, all_steps, _, their_history = published(ids, seed, **knobs)
    assert ours.tolist() == theirs.tolist() and not (ours == MASK).any()
    assert changes(ids, history) == changes(ids, their_history)
    assert all_steps == knobs["step_per_block"]
    assert forwards == taken[0] == len(changes(ids, history)) == len(history)


@pytest.mark.parametrize(("prefix", "idle"), [(False, 1), (True, 2)])
def test_how_many_forwards_are_idle(prefix: bool, idle: int) -> None:
    ids = blank(16, first=2 if prefix else None)
    assert (run(ids)[1], published(ids)[1]) == (16 - idle, 16)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from((*RULES, "origin")),
    st.sampled_from(["none", "shift", "time_grid"]),
    st.sampled_from([None, 3, 6]),
)
def test_a_rows_answer_does_not_depend_on_the_others(
    drafted: list[int], steps: int, rule: str, schedule: str, block: int | None
) -> None:
    """Rows with drafts of different lengths; `origin` draws, so only its counts are compared."""
    if rule == "origin" and schedule == "shift":
        schedule = "none"
    rows = blank(12, len(drafted))
    for row, n in zip(rows, drafted, strict=True):
        row[:n] = torch.arange(n) % MASK
    knobs: dict[str, Any] = {"step_per_block": steps, "remasking": rule, "schedule": schedule, "block_length": block}
    together, forwards, taken, history = run(rows, **knobs)
    assert not (together == MASK).any() and len(history) == forwards
    for i in range(len(rows)):
        alone, steps_alone, own, _ = run(rows[i : i + 1], **knobs)
        assert together[i, : drafted[i]].tolist() == rows[i, : drafted[i]].tolist()
        if rule != "origin":
            assert together[i].tolist() == alone[0].tolist()
            assert steps_alone == own[0] <= taken[i]


def test_pooled_counts_make_a_row_depend_on_the_others() -> None:
    """The published sampler spends the first row's counts on all rows, and masks remain."""
    rows = blank(12, 2)
    rows[1, :2] = torch.tensor([3, 1])
    knobs = {"step_per_block": 6, "schedule": "shift"}
    theirs, _, _, history = published(rows, **knobs)
    counts = tokens_per_step(12, 6, "shift")
    assert [int((h == MASK).sum()) for h in history] == [22 - sum(counts[: i + 1]) for i in range(6)]
    assert (theirs == MASK).sum() == 10
    assert not (run(rows, **knobs)[0] == MASK).any()


def test_a_ratio_without_a_schedule_rescales_the_grid() -> None:
    """The published sampler cuts it off, and the last step writes more than half of the answer."""
    left = [(h == MASK).sum().item() for h in run(blank(32), step_ratio=0.5)[3]]
    assert [a - b for a, b in pairwise([32, *left])] == [1, *[2] * 14, 3]
    cut_off = [(h == MASK).sum().item() for h in published(blank(32), step_ratio=0.5)[3]]
    assert [a - b for a, b in pairwise([32, *cut_off])] == [0, *[1] * 15][:15] + [18]


def test_named_schedules_never_have_more_steps_than_masks() -> None:
    ids = blank(16, first=2)
    assert run(ids, schedule="shift")[1] == 15
    with pytest.raises(UserError, match="cannot spread 15 masks over 16 steps with decode.schedule=shift"):
        published(ids, schedule="shift")


def test_no_steps_return_masks_in_parity_alone() -> None:
    ids, forwards, steps, history = published(blank(16), step_ratio=0.01)
    assert (ids == MASK).all() and (forwards, steps, history) == (0, [0], [])
    with pytest.raises(UserError, match="leave no step for a block of 16 tokens"):
        run(blank(16), step_ratio=0.01)


def test_the_mask_token_leaves_holes_in_parity_alone() -> None:
    def likes_the_mask(ids_BA: Tensor) -> Tensor:
        logits = dependent(ids_BA)
        logits[..., MASK] = 20.0
        return logits

    config = {"max_new_tokens": 6, "keep_history": True}
    found = []
    for knobs in ({}, {"parity": True, "allow_mask_token": True}):
        ids, *_ = denoise(at(likes_the_mask), blank(6), DecodeConfig(**config, **knobs), MASK, sampler=DREAM_SAMPLER)
        found.append((ids == MASK).sum().item())
    assert found == [0, 6]


@pytest.mark.parametrize("knobs", [{"temperature": 3.0, "top_p": 0.9}, {"alg_temp": 0.3}, {"remasking": "origin"}])
@pytest.mark.parametrize("parity", [False, True])
def test_a_seed_repeats_an_answer_and_another_changes_it(knobs: dict[str, Any], parity: bool) -> None:
    given = {**knobs, "parity": parity, "allow_mask_token": parity}
    config = DecodeConfig(max_new_tokens=12, step_per_block=4, keep_history=True, **given)

    def sampled(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        *_, history = denoise(at(dependent), blank(12), config, MASK, generator, sampler=DREAM_SAMPLER)
        return [h.tolist() for h in history]

    found = [sampled(seed) for seed in range(6)]
    assert found == [sampled(seed) for seed in range(6)]
    assert len({str(answer) for answer in found}) >= 4


def test_blocks_have_a_grid_each_and_a_block_ends_before_the_next_begins() -> None:
    ids = blank(12, first=2)
    *_, history = run(ids, block_length=4)
    order = [i for a, b in pairwise([ids, *history]) for i in torch.nonzero(a[0] != b[0])[:, 0].tolist()]
    assert sorted(order) == list(range(1, 12))
    assert [i // 4 for i in order] == [0] * 3 + [1] * 4 + [2] * 4


def test_early_stop_ends_an_answer_that_begins_with_eos() -> None:
    """The first token comes before the first step, so no step is needed."""
    config = DecodeConfig(max_new_tokens=6, early_stop=True)
    ids, forwards, *_ = denoise(at(dependent), blank(6, first=4), config, MASK, sampler=DREAM_SAMPLER, eos_id=4)
    assert (ids.tolist(), forwards) == ([[4] * 6], 0)


def test_a_threshold_works_over_dreams_confidence() -> None:
    fast = run(blank(12), threshold=0.3)
    assert not (fast[0] == MASK).any() and fast[1] < 12
    assert run(blank(12), threshold=1.0)[1] == 12


def test_a_start_of_several_drafts_is_kept() -> None:
    config = DecodeConfig(max_new_tokens=6)
    ids = start(2, config, MASK, [(3, MASK, 1), ()])
    found, *_ = denoise(at(dependent), ids, config, MASK, sampler=DREAM_SAMPLER)
    assert found[0, [0, 2]].tolist() == [3, 1] and not (found == MASK).any() and (found < W).all()
