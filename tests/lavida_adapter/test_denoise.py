"""The denoising loop over tables of logits whose right answers are known by hand."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter.engine import pick
from lavida_adapter.generate import DecodeConfig, LogitsFn, denoise, start, stop_early, tokens_per_step
from tests.lavida_adapter.test_choose import LOGITS
from tests.lavida_adapter.tiny import noise

W, MASK, EOS = 6, 5, 4
ORDER = {"low_confidence": [0, 2, 3, 1], "margin": [2, 1, 3, 0], "entropy": [0, 3, 2, 1]}


def table(ids_BA: Tensor) -> Tensor:
    """Logits [B, 4, W] that do not depend on what is written already; the mask token is impossible."""
    return LOGITS.expand(len(ids_BA), -1, -1)


def lively(ids_BA: Tensor, seed: int = 0) -> Tensor:
    """Logits that depend on every token of their own row, and on nothing else."""
    embed, mix = noise(W, 16, seed=seed), noise(16, 16, seed=seed + 1)
    x = embed[ids_BA] + 0.3 * noise(64, 16, seed=seed + 2)[: ids_BA.shape[1]]
    logits = torch.tanh((x + x.mean(1, keepdim=True)) @ mix) @ noise(16, W, seed=seed + 3)
    logits[..., MASK] = -20
    return logits


def at(logits_of: Callable[[Tensor], Tensor]) -> LogitsFn:
    """Logits of the slots that are asked for, in a tensor of their own."""

    def asked(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        logits = logits_of(ids_BA)
        return logits.clone() if want_BM is None else pick(logits, want_BM)

    return asked


def run(logits_of: Any, batch: int = 1, draft: tuple[int, ...] = (), seed: int = 0, **knobs: Any) -> Any:
    config = DecodeConfig(keep_history=True, **knobs)
    ids = start(batch, config, MASK, draft, torch.device("cpu"))
    found, forwards, steps, history = denoise(
        at(logits_of), ids, config, MASK, torch.Generator().manual_seed(seed), eos_id=EOS
    )
    assert max(steps, default=0) <= forwards
    return found, forwards, history


def committed(history: list[Tensor], row: int = 0) -> list[list[int]]:
    """Positions written at each step."""
    masked = [[True] * history[0].shape[1], *((h[row] == MASK).tolist() for h in history)]
    return [[i for i, (b, a) in enumerate(zip(x, y, strict=True)) if b and not a] for x, y in pairwise(masked)]


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
    _, forwards, history = run(lively, max_new_tokens=12, block_length=4)
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
    ids, forwards, history = run(lively, max_new_tokens=12, **knobs)
    assert [len(places) for places in committed(history)] == counts
    assert forwards == len(counts)
    assert not (ids == MASK).any()


def test_committed_tokens_never_change() -> None:
    _, _, history = run(lively, batch=3, max_new_tokens=12, step_per_block=4)
    for before, after in pairwise(history):
        written = before != MASK
        assert torch.equal(before[written], after[written])


def test_infilling_keeps_frozen_tokens_and_fills_the_holes() -> None:
    draft = (3, MASK, 1, MASK, MASK, 2)
    ids, forwards, history = run(lively, max_new_tokens=8, draft=draft)
    assert forwards == 5
    assert [history[0][0, i].item() for i in (0, 2, 5)] == [3, 1, 2]
    assert [ids[0, i].item() for i in (0, 2, 5)] == [3, 1, 2]
    assert not (ids == MASK).any()


def test_a_full_draft_needs_no_forward() -> None:
    ids, forwards, history = run(lively, max_new_tokens=4, draft=(1, 2, 3, 4))
    assert (ids.tolist(), forwards, history) == ([[1, 2, 3, 4]], 0, [])


def test_a_finished_block_is_skipped() -> None:
    """Its tokens are frozen, so the steps belong to the other blocks alone."""
    ids, forwards, _ = run(lively, max_new_tokens=8, block_length=4, draft=(1, 2, 3, 4))
    assert forwards == 4
    assert ids[0, :4].tolist() == [1, 2, 3, 4]


def test_a_draft_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="the draft has 5 tokens, the answer only 4: raise max_new_tokens"):
        run(lively, max_new_tokens=4, draft=(1,) * 5)


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
    together, forwards, taken, history = denoise(at(lively), rows, config, MASK)
    for i, n_masks in enumerate((6, 4, 1)):
        alone, steps, _, own = denoise(at(lively), rows[i : i + 1], config, MASK)
        counts = tokens_per_step(n_masks, 3, "shift")
        assert together[i].tolist() == alone[0].tolist()
        assert steps == taken[i] == len(counts)
        assert [h[i].tolist() for h in history[:steps]] == [h[0].tolist() for h in own]
        assert [(h == MASK).sum().item() for h in own] == [n_masks - sum(counts[: s + 1]) for s in range(steps)]
    assert forwards == 3
    assert rows[0].tolist() == [MASK] * 6  # the argument is not written to


def test_temperature_is_reproducible_and_does_something() -> None:
    def sample(seed: int, temperature: float) -> list[int]:
        ids: Tensor = run(table, max_new_tokens=4, temperature=temperature, seed=seed)[0]
        row: list[int] = ids[0].tolist()
        return row

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


def test_a_threshold_is_each_rows_own_affair() -> None:
    config = DecodeConfig(max_new_tokens=6, threshold=0.5)
    rows = torch.full((2, 6), MASK)
    rows[1, :4] = 2
    together, _, steps, _ = denoise(at(lively), rows, config, MASK)
    for i in range(2):
        alone, _, taken, _ = denoise(at(lively), rows[i : i + 1], config, MASK)
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


def test_history_on_request() -> None:
    config = DecodeConfig(max_new_tokens=4)
    assert denoise(at(table), start(1, config, MASK, (), torch.device("cpu")), config, MASK)[3] == []


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"max_new_tokens": 0}, "decode.max_new_tokens=0: give at least 1"),
        ({"max_new_tokens": 16, "block_length": 3}, "decode.block_length=3 does not divide decode.max_new_tokens=16"),
        ({"max_new_tokens": 16, "block_length": 128}, "decode.block_length=128 does not divide"),
        ({"max_new_tokens": 16, "block_length": 0}, "decode.block_length=0 does not divide"),
        ({"max_new_tokens": 16, "block_length": -4}, "decode.block_length=-4 does not divide"),
        ({"step_ratio": 0.5, "step_per_block": 4}, "both set the number of steps: give one of them"),
        ({"step_ratio": 0.05}, "step_ratio=0.05, step_per_block=None leave no step for a block of 16 tokens"),
        ({"step_per_block": 0}, "leave no step for a block of 16 tokens"),
        ({"step_per_block": -1}, "leave no step"),
        ({"step_ratio": 1.5}, "decode.step_ratio=1.5: give a share of the block, above 0 and at most 1"),
        ({"step_ratio": 0.0}, "decode.step_ratio=0.0"),
        ({"step_ratio": math.nan}, "decode.step_ratio=nan"),
        ({"schedule": "fast"}, "decode.schedule='fast': choose one of none, shift"),
        ({"threshold": 0.0}, "decode.threshold=0.0: give a probability, above 0 and at most 1"),
        ({"threshold": 0.9, "step_ratio": 0.5}, "leave out step_ratio, step_per_block and schedule"),
        ({"threshold": 0.9, "remasking": "margin"}, "decode.remasking=margin does not rank by it"),
        ({"engine": "fast"}, "decode.engine='fast': choose one of eager, compile, graph"),
        ({"engine": "compile", "prefix_cache": False}, "decode.prefix_cache=false has none"),
        ({"shift": 0.0}, "decode.shift=0.0: give a positive number"),
        ({"remasking": "entrophy"}, "decode.remasking='entrophy': choose one of low_confidence, margin"),
        ({"temperature": -0.1}, "decode.temperature=-0.1: give 0 or more"),
        ({"temperature": math.inf}, "decode.temperature=inf"),
    ],
)
def test_impossible_combinations_raise_one_sentence(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        DecodeConfig(**knobs)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_knobs_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match="refix_lm"):
        DecodeConfig(refix_lm=True)  # type: ignore[call-arg]  # what is tested


@pytest.mark.parametrize(("least", "asked"), [(1, [4, 3, 2, 1]), (2, [4, 3, 2, 2]), (9, [4, 4, 4, 4])])
def test_shapes_vary_less_on_request(least: int, asked: list[int]) -> None:
    seen, config = [], DecodeConfig(max_new_tokens=4)

    def logits_of(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        seen.append(ids_BA.shape[1] if want_BM is None else want_BM.shape[1])
        return at(table)(ids_BA, want_BM)

    blank = start(1, config, MASK, (), torch.device("cpu"))
    ids, *_ = denoise(logits_of, blank, config, MASK, least_slots=least)
    assert seen == asked and ids.tolist() == [[0, 0, 1, 2]]
