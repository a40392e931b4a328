"""Dream's rules by hand: which tokens are candidates, how sure the sampler is, and which slots a step writes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavida_adapter.decode_config import Rule
from lavida_adapter.dream_published import filtered
from lavida_adapter.dream_sampling import TOP_K, commit_dream, confidence_under, inverse_cdf, likely
from lavida_adapter.sampling import Draw, topk_confident
from tests.lavida_adapter.tables import LOGITS, TABLE
from tests.lavida_adapter.tiny import noise

OPEN = torch.ones(1, 4, dtype=torch.bool)
ALL = [0.40, 0.15, 0.15, 0.15, 0.15]


def draw(seed: int = 0, n: int = 4) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), n, None)


def over_vocabulary(logits: Tensor, rule: Rule) -> Tensor:
    p, ids = likely(logits, rule)
    return p if ids is None else torch.zeros_like(logits).scatter(-1, ids, p)


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        (Rule(top_p=0.49), [[1], [0.40, 0.15]]),
        (Rule(top_p=0.6), [[0.50, 0.49], [0.40, 0.15, 0.15]]),
        (Rule(top_p=1.0), [[0.50, 0.49, 0.01], ALL]),
        (Rule(top_k=1), [[1], [1]]),
        (Rule(top_k=2), [[0.50, 0.49], [0.40, 0.15]]),
        (Rule(top_p=0.6, top_k=2), [[0.50, 0.49], [0.40, 0.15]]),
        (Rule(top_k=None), [[0.50, 0.49, 0.01], ALL]),
        (Rule(top_k="model"), [[0.50, 0.49, 0.01], ALL]),
        (Rule(temperature=0.5), [[0.50**2, 0.49**2, 0.01**2], [p**2 for p in ALL]]),
        (Rule(temperature=0.5, top_p=0.49), [[1], [0.40**2]]),  # of 0.25, 0.64 is above 0.49 already
    ],
)
def test_candidates_by_hand(rule: Rule, rows: list[list[float]]) -> None:
    """Of equally likely tokens any may stay, so probabilities are compared in order of size."""
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for row, weights in zip(expected, rows, strict=True):
        row[: len(weights)] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    found = over_vocabulary(LOGITS[:2].double(), rule).sort(-1, descending=True).values[:, :5]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_models_own_top_k_is_fifty() -> None:
    logits = noise(3, 400)
    assert TOP_K == 50
    for top_k, n in (("model", 50), (None, 400), (7, 7), (1000, 400)):
        assert (over_vocabulary(logits, Rule(top_k=top_k)) > 0).sum(-1).tolist() == [n] * 3  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    st.one_of(st.none(), st.floats(0.05, 1.0)),
    st.sampled_from([None, "model", 1, 3, 80]),
    st.sampled_from(["low_confidence", "margin", "entropy"]),
)
def test_the_quick_filter_keeps_what_the_published_one_keeps(
    seed: int, temperature: float, top_p: float | None, top_k: int | str | None, remasking: str
) -> None:
    """In float64, where no cumulative probability is within rounding of `top_p`."""
    rule = Rule(remasking, temperature, None, top_p, top_k)  # type: ignore[arg-type]
    logits = 2 * noise(6, 80, seed=seed).double()
    theirs = filtered(logits, rule).softmax(-1)
    p, ids = likely(logits, rule)
    torch.testing.assert_close(over_vocabulary(logits, rule), theirs, rtol=0, atol=1e-12)
    best = theirs.argmax(-1)
    ours = confidence_under(p, p.argmax(-1), remasking)
    torch.testing.assert_close(ours, confidence_under(theirs, best, remasking), rtol=0, atol=1e-9)
    assert torch.equal(best, logits.argmax(-1))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("low_confidence"), [0.50, 0.40, 0.46, 0.44]),
        (Rule("margin"), [0.01, 0.25, 0.28, 0.05]),
        (
            Rule("entropy"),
            [(TABLE[i].clamp_min(1e-30) * TABLE[i].clamp_min(1e-30).log()).sum().item() for i in range(4)],
        ),
        (Rule("margin", top_k=1), [1.0] * 4),
        (Rule("low_confidence", top_k=2), [50 / 99, 40 / 55, 46 / 64, 44 / 83]),
    ],
)
def test_confidence_is_that_of_the_filtered_distribution(rule: Rule, expected: list[float]) -> None:
    p, _ = likely(LOGITS, rule)
    sure = confidence_under(p, p.argmax(-1), rule.remasking)
    torch.testing.assert_close(sure, torch.tensor(expected), rtol=0, atol=1e-5)
    order = sure.argsort(descending=True, stable=True).tolist()
    for k in range(5):
        tokens, commit = commit_dream(LOGITS[None], OPEN, [k], rule, draw())
        assert sorted(order[:k]) == torch.nonzero(commit[0])[:, 0].tolist()
        assert tokens.tolist() == [[0, 0, 1, 2]]


def test_temperature_counts_in_the_confidence() -> None:
    """LLaDA's confidence comes from the clean logits, Dream's from what is drawn."""
    for temperature in (0.3, 2.0):
        rule = Rule("entropy", temperature, top_k=None)
        p, _ = likely(LOGITS, rule)
        expected = (LOGITS / temperature).softmax(-1)
        torch.testing.assert_close(p, expected)
        sure = confidence_under(p, p.argmax(-1), "entropy")
        torch.testing.assert_close(sure, torch.special.xlogy(expected, expected).sum(-1), rtol=0, atol=1e-5)


def test_equal_slots_go_in_order_and_equal_tokens_too() -> None:
    flat = torch.zeros(1, 6, 9)
    flat[..., [3, 5]] = 2.0
    for dtype in (torch.float32, torch.bfloat16):
        tokens, commit = commit_dream(flat.to(dtype), torch.ones(1, 6, dtype=torch.bool), [3], Rule(), draw(n=6))
        assert tokens.tolist() == [[3] * 6]
        assert commit.tolist() == [[True] * 3 + [False] * 3]
    values, here = torch.tensor([[1.0, 7, 7, 7, 9]] * 2), torch.tensor([[True] * 5, [True, False, True, True, False]])
    expected = [[False, True, False, False, True], [False, False, True, True, False]]
    assert topk_confident(values, here, [2, 2]).tolist() == expected
    assert topk_confident(values, here, [0, 1]).tolist() == [[False] * 5, [False, False, True, False, False]]


def test_bfloat16_logits_rank_in_float32() -> None:
    """Two slots whose bfloat16 probabilities are equal: the surer one is not the first."""
    logits = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    logits[0, 0], logits[0, 1] = torch.tensor([8.0, 0.0, 0.0]), torch.tensor([8.0, 0.0, -1.0])
    assert len(set(logits.softmax(-1)[0, :, 0].tolist())) == 1
    _, commit = commit_dream(logits, torch.ones(1, 2, dtype=torch.bool), [1], Rule(), draw(n=2))
    assert commit.tolist() == [[False, True]]


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_temperature_draws_from_the_candidates(top_k: int | None) -> None:
    rule = Rule(temperature=1.0, top_k=top_k)
    tokens, _ = commit_dream(LOGITS.expand(4000, -1, -1), OPEN.expand(4000, -1), [1] * 4000, rule, draw())
    share = torch.nn.functional.one_hot(tokens, LOGITS.shape[1]).double().mean(0)
    expected = filtered(LOGITS.double(), rule).softmax(-1)
    assert ((share > 0).sum(-1) <= (top_k or 5)).all()
    clear = [0, 3]  # the other slots have tokens as likely as the third
    torch.testing.assert_close(share[clear], expected[clear], rtol=0, atol=0.03)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True))
def test_nothing_of_probability_zero_is_drawn(weights: list[float], u: float) -> None:
    p = torch.tensor([*weights, 0.25, 0.0], dtype=torch.float64)
    place = inverse_cdf(p / p.sum(), torch.tensor(u, dtype=torch.float64)).item()
    assert p[place] > 0
    before = (p[:place].sum() / p.sum()).item()
    assert before - 1e-12 <= u <= before + (p[place] / p.sum()).item() + 1e-12


def test_a_draw_is_the_same_whichever_slots_are_computed() -> None:
    logits, rule, want = noise(2, 8, 30), Rule(temperature=1.0, alg_temp=0.5), torch.tensor([[1, 4, 6], [0, 2, 7]])
    open_BM = torch.zeros(2, 8, dtype=torch.bool).scatter(1, want, True)
    tokens, commit = commit_dream(logits, open_BM, [2, 1], rule, draw(3, 8))
    some = logits.gather(1, want[..., None].expand(-1, -1, 30))
    few = Draw(torch.Generator().manual_seed(3), 8, want)
    again, chosen = commit_dream(some, torch.ones_like(want, dtype=torch.bool), [2, 1], rule, few)
    assert torch.equal(again, tokens.gather(1, want)) and torch.equal(chosen, commit.gather(1, want))


def test_a_threshold_takes_all_that_are_sure_and_one_in_any_case() -> None:
    for threshold, places in ((0.45, [0, 2]), (0.99, [0]), (0.1, [0, 1, 2, 3])):
        _, commit = commit_dream(LOGITS[None], OPEN, [1], Rule(threshold=threshold), draw())
        assert torch.nonzero(commit[0])[:, 0].tolist() == places


def test_alg_temp_draws_slots_by_their_confidence() -> None:
    """Without replacement from the softmax of confidence / alg_temp; a small one takes the surest."""
    n, rule = 4000, Rule("low_confidence", alg_temp=0.05)
    _, commit = commit_dream(LOGITS.expand(n, -1, -1), OPEN.expand(n, -1), [1] * n, rule, draw())
    expected = (TABLE.amax(-1) / 0.05).softmax(-1)
    torch.testing.assert_close(commit.float().mean(0), expected, rtol=0, atol=0.03)
    _, pairs = commit_dream(LOGITS.expand(n, -1, -1), OPEN.expand(n, -1), [2] * n, rule, draw(1))
    p = expected.tolist()
    first_or_second = p[0] + sum(p[i] * p[0] / (1 - p[i]) for i in (1, 2, 3))
    assert math.isclose(pairs[:, 0].float().mean().item(), first_or_second, abs_tol=0.03)
    _, surest = commit_dream(LOGITS[None], OPEN, [1], Rule(alg_temp=1e-4), draw())
    assert surest.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("name", ["random", "origin"])
def test_random_slots_are_even(name: str) -> None:
    n = 4000
    tokens, commit = commit_dream(LOGITS.expand(n, -1, -1), OPEN.expand(n, -1), [1] * n, Rule(name), draw())
    torch.testing.assert_close(commit.float().mean(0), torch.full((4,), 0.25), rtol=0, atol=0.03)
    assert tokens[0].tolist() == [0, 0, 1, 2]
