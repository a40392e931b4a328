"""The denoising loop over tables of logits whose right answers are known by hand; schedules; what a step commits."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavida_adapter.engine import pick
from lavida_adapter.generate import (
    SCHEDULES,
    DecodeConfig,
    Draw,
    LogitsFn,
    Rule,
    candidates,
    commit_tokens,
    confidence,
    denoise,
    is_clear,
    start,
    stop_early,
    tokens_per_step,
    topk_confident,
)
from tests.lavida_adapter.tiny import noise

# Probabilities of tokens 0..4 at four positions; what each rule is surest of differs.
TABLE = torch.tensor(
    [
        [0.50, 0.49, 0.01, 0.00, 0.00],  # largest probability 0.50, margin 0.01, entropy 0.74
        [0.40, 0.15, 0.15, 0.15, 0.15],  # largest 0.40, margin 0.25, entropy 1.50
        [0.00, 0.46, 0.18, 0.18, 0.18],  # largest 0.46, margin 0.28, entropy 1.28
        [0.00, 0.00, 0.44, 0.39, 0.17],  # largest 0.44, margin 0.05, entropy 1.03
    ]
)
LOGITS = torch.cat([TABLE, torch.zeros(4, 1)], dim=1).clamp_min(1e-9).log()
"""[4, 6]; the last token, the mask, is impossible."""
NO_DRAW = Draw(None, 4, None)


@pytest.mark.parametrize("rule", ["low_confidence", "margin", "entropy"])
def test_confidences_by_hand(rule: str) -> None:
    logits = LOGITS[None]
    tokens = candidates(logits, 0.0, NO_DRAW)
    sure = confidence(logits, tokens, rule)
    p = TABLE.double()
    expected = {
        "low_confidence": p.amax(-1),
        "margin": p.sort(-1).values[:, -1] - p.sort(-1).values[:, -2],
        "entropy": torch.special.xlogy(p, p).sum(-1),
    }[rule]
    assert sure.dtype == torch.float64
    torch.testing.assert_close(sure[0], expected, rtol=0, atol=1e-6)
    assert tokens.tolist() == [[0, 0, 1, 2]]


def test_a_temperature_of_one_samples_the_model() -> None:
    """Gumbel noise at temperature 1 draws from softmax; confidence comes from the clean logits."""
    logits = LOGITS.expand(4000, -1, -1)
    draw = Draw(torch.Generator().manual_seed(0), 4, None)
    tokens = candidates(logits, 1.0, draw)
    sure = confidence(logits, tokens, "low_confidence")
    share = torch.nn.functional.one_hot(tokens, LOGITS.shape[1])[..., :5].double().mean(0)
    torch.testing.assert_close(share, TABLE.double(), rtol=0, atol=0.03)
    torch.testing.assert_close(sure, TABLE.double().expand(4000, -1, -1).gather(-1, tokens[..., None])[..., 0])


@pytest.mark.parametrize("seed", range(4))
def test_float32_ranks_like_float64_or_steps_back(seed: int) -> None:
    """Random logits, some of them within rounding of each other, some so sure that float32 sees 1 everywhere."""
    logits = 4 * noise(8, 12, 300, seed=seed)
    logits[1, 1] = logits[1, 0]
    logits[1, 1, 0] += 3e-7
    logits[2, :, 7] = 40.0 + noise(12, seed=seed)
    logits[3] = logits[3, :1] + 1e-7 * noise(12, 300, seed=seed)
    open_BM = torch.ones(8, 12, dtype=torch.bool)
    open_BM[4, 6:] = False
    stepped_back = 0
    for k in (1, 3, 6):
        for b in range(8):
            row, here, ks = logits[b : b + 1], open_BM[b : b + 1], [k]
            tokens, chosen = commit_tokens(row, here, ks, Rule(), NO_DRAW)
            exact = topk_confident(confidence(row, tokens, "low_confidence"), here, ks)
            assert torch.equal(chosen, exact)
            stepped_back += not is_clear(confidence(row, tokens, "low_confidence", torch.float32), here, ks)
    assert 3 <= stepped_back <= 16


@pytest.mark.parametrize(("scale", "least"), [(0.02, 0), (1.0, 28), (8.0, 28)])
def test_small_probabilities_rank_in_float32(scale: float, least: int) -> None:
    """A large vocabulary makes all of them small; what counts is how they compare."""
    clear = 0
    for seed in range(32):
        logits, here = scale * noise(1, 8, 50_000, seed=seed), torch.ones(1, 8, dtype=torch.bool)
        tokens, chosen = commit_tokens(logits, here, [2], Rule(), NO_DRAW)
        assert torch.equal(chosen, topk_confident(confidence(logits, tokens, "low_confidence"), here, [2]))
        clear += is_clear(confidence(logits, tokens, "low_confidence", torch.float32), here, [2])
    assert clear >= least


def test_what_float32_cannot_hold_is_not_clear() -> None:
    here = torch.ones(1, 2, dtype=torch.bool)
    assert is_clear(torch.tensor([[2e-30, 1e-30]]), here, [1])
    assert not is_clear(torch.tensor([[2e-40, 1e-40]]), here, [1])
    assert not is_clear(torch.tensor([[0.0, 0.0]]), here, [1])


W, MASK, EOS = 6, 5, 4
ORDER = {"low_confidence": [0, 2, 3, 1], "margin": [2, 1, 3, 0], "entropy": [0, 3, 2, 1]}


def table(ids_BA: Tensor) -> Tensor:
    """Logits [B, 4, W] that do not depend on what is written already; the mask token is impossible."""
    return LOGITS.expand(len(ids_BA), -1, -1)


def dependent(ids_BA: Tensor, seed: int = 0) -> Tensor:
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
    ids = start(batch, config, MASK, [draft] * batch, torch.device("cpu"))
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

    blank = start(1, config, MASK, (), torch.device("cpu"))
    ids, _, _, history = denoise(logits_of, blank, config, MASK, least_slots=least)
    assert seen == asked and ids.tolist() == [[0, 0, 1, 2]]
    assert history == [], "only on request"


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
    assert len(set(found.values())) == 4
    assert [tokens_per_step(0, 5, schedule) for schedule in SCHEDULES] == [[]] * 5
