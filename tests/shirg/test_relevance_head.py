"""The relevance head against its formula written out, and what an untrained one does."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.relevance_head import RelevanceHead, question_vector, standardised
from tests.refusals import assert_says, message_of

B, N, D, W = 2, 7, 5, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained_head(**options: Any) -> RelevanceHead:
    """A head whose parameters are all random, with statistics of its own."""
    head = RelevanceHead(**{"states": D, "words": W, "hidden": 4, **options})
    with torch.no_grad():
        for i, p in enumerate(head.parameters()):
            p.copy_(drawn(*p.shape, seed=10 + i))
    head.standardise_by([drawn(50, D, seed=1) * 3 + 2])
    return head


@pytest.mark.parametrize("question", [True, False])
@pytest.mark.parametrize("base", [True, False])
def test_against_the_formula_written_out(question: bool, base: bool) -> None:
    head = trained_head(question=question, base=base)
    x, valid = drawn(B, N, D, seed=2), torch.ones(B, N, dtype=torch.bool)
    valid[0, :2] = False
    q, r = drawn(B, W, seed=3), drawn(B, N, seed=4)
    found = head(x, valid, q if question else None, r if base else None)
    for b in range(B):
        for n in range(N):
            state = (x[b, n] - head.mean_D) / head.std_D
            expected = head.last.weight[0] @ F.gelu(head.first.weight @ state + head.first.bias)
            if question:
                expected = expected + 512 * state @ head.match_DW @ q[b] / (D * math.sqrt(W))
            if base:
                there = r[b][valid[b]]
                expected = expected + 16 * head.gain * (r[b, n] - there.mean()) / there.std(correction=0)
            assert found[b, n].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_it_starts_as_its_base() -> None:
    head = RelevanceHead(states=D, words=W)
    valid, base = torch.ones(B, N, dtype=torch.bool), drawn(B, N)
    found = head(drawn(B, N, D), valid, drawn(B, W), base)
    assert torch.equal(found.argsort(-1), base.argsort(-1))
    assert not RelevanceHead(states=D, words=W, base=False)(drawn(B, N, D), valid, drawn(B, W), None).any()


def test_standard_scores_leave_padding_out() -> None:
    values, valid = torch.tensor([[1.0, 3.0, 100.0], [2.0, 2.0, 2.0]]), torch.tensor([[True, True, False], [True] * 3])
    found = standardised(values, valid)
    assert found[0, :2].tolist() == pytest.approx([-1.0, 1.0], abs=1e-5) and found[1].tolist() == [0.0, 0.0, 0.0]


def test_a_question_is_the_sum_of_its_centred_directions() -> None:
    words, mean = [drawn(3, W, seed=5), drawn(1, W, seed=6)], drawn(W, seed=7)
    found = question_vector(words, mean)
    expected = sum((word - mean) / (word - mean).norm() for word in words[0]) / math.sqrt(3)
    assert torch.allclose(found[0], expected, atol=1e-6)
    assert torch.allclose(found[1], F.normalize(words[1][0] - mean, dim=0), atol=1e-6)


def test_statistics_are_those_of_the_states() -> None:
    head, states = RelevanceHead(states=2, words=W), torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    head.standardise_by([states])
    assert head.mean_D.tolist() == [2.0, 5.0] and head.std_D.tolist() == pytest.approx([1.0, 1e-6])
    # In parts, and far from zero, where float32 sums of squares would cancel.
    far = drawn(999, 2, seed=3) + 1000
    head.standardise_by(far.split([1, 600, 398]))
    assert head.mean_D.tolist() == pytest.approx(far.double().mean(0).tolist(), rel=1e-7)
    assert head.std_D.tolist() == pytest.approx(far.double().std(0, correction=0).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden": 0}, "head.hidden=0: give a whole number from 1 to 65,536"),
        ({"states": 2.5}, "head.states=2.5: give a whole number"),
        ({"hidden": 10**9}, "head.hidden=1000000000: give a whole number"),
        ({"question": "no"}, "head.question='no': give true or false"),
    ],
)
def test_refusals(wrong: dict[str, Any], said: str) -> None:
    assert_says(message_of(partial(RelevanceHead, **{"states": D, "words": W, **wrong})), said)
