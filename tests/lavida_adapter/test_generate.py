"""The denoising loop over tables of logits whose right answers are known by hand; schedules; what a step commits."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.generate import denoise, filling_steps, masks_left, start, stop_early
from lavida_adapter.sampling import LLADA_SAMPLER
from lavida_adapter.schedules import SCHEDULES, tokens_per_step
from tests.lavida_adapter.tables import EOS, MASK, W, at, committed, dependent, run, table

ORDER = {"low_confidence": [0, 2, 3, 1], "margin": [2, 1, 3, 0], "entropy": [0, 3, 2, 1]}


@pytest.mark.parametrize("rule", ORDER)
def test_remasking_rules_commit_the_surest_first(rule: str) -> None:
    ids, forwards, history = run(table, max_new_tokens=4, remasking=rule)
    assert committed(history) == [[i] for i in ORDER[rule]]
    assert ids.tolist() == [[0, 0, 1, 2]]
    assert forwards == 4


def test_random_remasking_is_random_order_but_not_random_tokens() -> None:
    orders = set()
    for seed in range(12):
        ids, _, history = run(table, max_new_tokens=4, remasking="random", seed=seed)
        assert ids.tolist() == [[0, 0, 1, 2]]
        orders.add(str(committed(history)))
        assert committed(history) == committed(run(table, max_new_tokens=4, remasking="random", seed=seed)[2])
    assert len(orders) > 4


def test_blocks_are_finished_from_left_to_right() -> None:
    _, forwards, history = run(dependent, max_new_tokens=12, block_length=4)
    assert forwards == 12
    for step, places in enumerate(committed(history)):
        assert len(places) == 1
        assert places[0] // 4 == step // 4


@pytest.mark.parametrize(
    ("knobs", "counts"),
    [
        ({}, [1] * 12),
        ({"step_ratio": 0.5}, [2] * 6),
        ({"step_per_block": 5}, [3, 3, 2, 2, 2]),
        ({"step_per_block": 99}, [1] * 12),
        ({"block_length": 6, "step_per_block": 2}, [3, 3, 3, 3]),
        ({"block_length": 3, "step_ratio": 0.34}, [3, 3, 3, 3]),
        ({"block_length": 6, "step_ratio": 0.5, "schedule": "shift", "shift": 1 / 3}, None),
        ({"step_per_block": 4, "schedule": "cosine"}, None),
    ],
)
def test_step_counts(knobs: dict[str, Any], counts: list[int] | None) -> None:
    if counts is None:
        block, s = knobs.get("block_length", 12), 4 if "step_per_block" in knobs else 3
        counts = tokens_per_step(block, s, knobs["schedule"], knobs.get("shift", 1 / 3)) * (12 // block)
    ids, forwards, history = run(dependent, max_new_tokens=12, **knobs)
    assert [len(places) for places in committed(history)] == counts
    assert forwards == len(counts) and not (ids == MASK).any()
    for before, after in pairwise(history):  # committed tokens never change
        assert torch.equal(before[before != MASK], after[before != MASK])


def test_infilling_keeps_frozen_tokens_and_fills_the_holes() -> None:
    draft = (3, MASK, 1, MASK, MASK, 2)
    ids, forwards, history = run(dependent, max_new_tokens=8, draft=draft)
    assert forwards == 5
    assert [history[0][0, i].item() for i in (0, 2, 5)] == [3, 1, 2]
    assert [ids[0, i].item() for i in (0, 2, 5)] == [3, 1, 2]
    assert not (ids == MASK).any()


def test_a_finished_block_is_skipped() -> None:
    """Its tokens are frozen, so the steps belong to the other blocks alone."""
    ids, forwards, _ = run(dependent, max_new_tokens=8, block_length=4, draft=(1, 2, 3, 4))
    assert forwards == 4
    assert ids[0, :4].tolist() == [1, 2, 3, 4]
    ids, forwards, history = run(dependent, max_new_tokens=4, draft=(1, 2, 3, 4))
    assert (ids.tolist(), forwards, history) == ([[1, 2, 3, 4]], 0, [])


def greedy_mask(ids_BA: Tensor) -> Tensor:
    """The mask token is the likeliest everywhere but at position 1."""
    logits = table(ids_BA).clone()
    logits[:, [0, 2, 3], MASK] = 9.0
    return logits


def test_the_mask_token_is_committed_only_when_allowed() -> None:
    ids, forwards, _ = run(greedy_mask, max_new_tokens=4)
    assert (ids.tolist(), forwards) == ([[0, 0, 1, 2]], 4)
    holes, forwards, _ = run(greedy_mask, max_new_tokens=4, allow_mask_token=True)
    assert forwards == 4
    assert holes.tolist() == [[MASK] * 4]  # the surest candidate is a hole at every step
    holes, _, _ = run(greedy_mask, max_new_tokens=4, allow_mask_token=True, step_per_block=1)
    assert holes.tolist() == [[MASK, 0, MASK, MASK]]


def test_rows_are_independent_of_their_batch_mates() -> None:
    """Rows with six, four and one mask: each follows its own schedule and ends with the tokens that it gets alone."""
    config = DecodeConfig(max_new_tokens=6, step_per_block=3, schedule="shift", keep_history=True)
    rows = torch.full((3, 6), MASK)
    rows[1, :2] = torch.tensor([3, 1])
    rows[2, 1:] = 4
    together, forwards, taken, history = denoise(at(dependent), rows, config, MASK)
    for i, n_masks in enumerate((6, 4, 1)):
        alone, steps, _, own = denoise(at(dependent), rows[i : i + 1], config, MASK)
        counts = tokens_per_step(n_masks, 3, "shift")
        assert together[i].tolist() == alone[0].tolist()
        assert steps == taken[i] == len(counts)
        assert [h[i].tolist() for h in history[:steps]] == [h[0].tolist() for h in own]
        assert [(h == MASK).sum().item() for h in own] == [n_masks - sum(counts[: s + 1]) for s in range(steps)]
    assert forwards == 3
    assert rows[0].tolist() == [MASK] * 6  # the argument is not written to


@pytest.mark.parametrize(
    "options",
    [
        *({"schedule": schedule, "step_per_block": steps} for schedule in SCHEDULES for steps in (None, 2, 3)),
        {"schedule": "time_grid", "eps": 0.4},
        {"threshold": 0.3},
        {"remasking": "origin", "step_per_block": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [2, 3, 6])
def test_filling_steps_are_those_that_run(options: dict[str, Any], block: int) -> None:
    """By what is committed; where the content or a draw decides there may be fewer, at most one for each mask."""
    config, fewer = DecodeConfig(max_new_tokens=6, block_length=block, **options), []
    for draft in ((), (3, MASK, 1), (3, 1, MASK, 2, 1), (3, 1, 2, 3, 1), (3, 1, 2, 3, 1, 2)):
        n_masks = masks_left(start(1, config, MASK, [draft]), MASK, block)
        (steps,) = filling_steps(n_masks, config, LLADA_SAMPLER)
        forwards = run(dependent, draft=draft, max_new_tokens=6, block_length=block, **options)[1]
        assert steps == sorted(set(steps)) and all(n_masks[0][i] > 0 for i, _ in steps)
        assert forwards <= len(steps) <= sum(n_masks[0])
        fewer.append(len(steps) - forwards)
    assert any(fewer) == ("threshold" in options or "remasking" in options)


def test_temperature_is_reproducible_and_does_something() -> None:
    def sample(seed: int, temperature: float) -> Any:
        return run(table, max_new_tokens=4, temperature=temperature, seed=seed)[0][0].tolist()

    assert [sample(s, 1.0) for s in range(8)] == [sample(s, 1.0) for s in range(8)]
    assert len({tuple(sample(s, 1.0)) for s in range(8)}) > 3
    assert all(sample(s, 0.0) == [0, 0, 1, 2] for s in range(4))
    assert all(MASK not in sample(s, 3.0) for s in range(30))


def test_a_threshold_commits_what_is_sure_and_one_token_in_any_case() -> None:
    """Confidences are 0.50, 0.40, 0.46, 0.44; everything above the threshold goes at once."""
    for threshold, steps in ((0.45, [[0, 2], [3], [1]]), (0.3, [[0, 1, 2, 3]]), (0.9, [[0], [2], [3], [1]])):
        ids, forwards, history = run(table, max_new_tokens=4, threshold=threshold)
        assert committed(history) == steps and forwards == len(steps)
        assert ids.tolist() == [[0, 0, 1, 2]]


def test_a_threshold_counts_for_each_row_alone() -> None:
    config = DecodeConfig(max_new_tokens=6, threshold=0.5)
    rows = torch.full((2, 6), MASK)
    rows[1, :4] = 2
    together, _, steps, _ = denoise(at(dependent), rows, config, MASK)
    for i in range(2):
        alone, _, taken, _ = denoise(at(dependent), rows[i : i + 1], config, MASK)
        assert together[i].tolist() == alone[0].tolist() and [steps[i]] == taken


def ending(ids_BA: Tensor) -> Tensor:
    """Token 1 at position 0, then eos; the later, the surer, so that eos comes first."""
    logits = torch.full((*ids_BA.shape, W), -4.0)
    logits[:, 0, 1] = 1.0
    logits[:, 1:, EOS] = 2.0 + torch.arange(ids_BA.shape[1] - 1)
    return logits


def test_early_stop_waits_for_what_is_before_an_eos() -> None:
    whole, forwards, _ = run(ending, max_new_tokens=6)
    assert forwards == 6
    ids, forwards, _ = run(ending, max_new_tokens=6, early_stop=True)
    assert ids.tolist() == whole.tolist() == [[1, EOS, EOS, EOS, EOS, EOS]]
    assert forwards == 6, "the last eos are the surest: a mask lies before each of them until the end"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1, 4, 5, 5], [1, 4, 4, 4]),
        ([1, 4, 5, 4], [1, 4, 4, 4]),
        ([1, 5, 4, 5], [1, 5, 4, 5]),  # a mask before the eos
        ([1, 4, 5, 2], [1, 4, 5, 2]),  # a word behind it
        ([1, 2, 3, 5], [1, 2, 3, 5]),  # no eos
        ([4, 5, 5, 5], [4, 4, 4, 4]),
    ],
)
def test_when_an_answer_has_ended(before: list[int], after: list[int]) -> None:
    assert stop_early(torch.tensor([before, [5] * 4]), MASK, EOS).tolist() == [after, [5] * 4]


def test_early_stop_takes_fewer_steps_where_the_first_tokens_are_surest() -> None:
    def reading(ids_BA: Tensor) -> Tensor:
        logits = ending(ids_BA)
        logits[:, 1:, EOS] = 8.0 - torch.arange(ids_BA.shape[1] - 1)
        logits[:, 0, 1] = 9.0
        return logits

    whole, all_steps, _ = run(reading, max_new_tokens=6, block_length=3)
    ids, forwards, _ = run(reading, max_new_tokens=6, block_length=3, early_stop=True)
    assert (ids.tolist(), all_steps, forwards) == (whole.tolist(), 6, 2)


@pytest.mark.parametrize(("least", "asked"), [(1, [4, 3, 2, 1]), (2, [4, 3, 2, 2]), (9, [4, 4, 4, 4])])
def test_shapes_vary_less_on_request(least: int, asked: list[int]) -> None:
    seen, config = [], DecodeConfig(max_new_tokens=4)

    def logits_of(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        seen.append(ids_BA.shape[1] if want_BM is None else want_BM.shape[1])
        return at(table)(ids_BA, want_BM)

    blank = start(1, config, MASK, ())
    ids, _, _, history = denoise(logits_of, blank, config, MASK, least_slots=least)
    assert seen == asked and ids.tolist() == [[0, 0, 1, 2]]
    assert history == [], "only on request"


def test_the_confidence_of_every_step_is_kept() -> None:
    """The likeliest tokens have probabilities of 0.5, 0.4, 0.46 and 0.44."""
    sure: list[Tensor] = []
    config = DecodeConfig(max_new_tokens=4, keep_history=True)
    _, _, _, history = denoise(at(table), start(1, config, MASK, ()), config, MASK, sure=sure)
    assert committed(history) == [[0], [2], [3], [1]]
    expected = [[0.5, 0, 0, 0], [0, 0, 0.46, 0], [0, 0, 0, 0.44], [0, 0.4, 0, 0]]
    torch.testing.assert_close(torch.cat(sure), torch.tensor(expected))
