"""The losses of random subsets against loops, their gradients against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from shirg.subset_losses import (
    Odds,
    answer_probabilities,
    gumbel,
    mil_loss,
    regression_loss,
    subset_shares,
    subset_sums,
)

B, M, N = 3, 4, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORE, LOSS = drawn(B, N), drawn(B, M, seed=1).abs()
MEMBER = drawn(B, M, N, seed=2) > 0
COMPETING = torch.ones(B, N, dtype=torch.bool)
COMPETING[0, 0] = False
ODDS = torch.tensor([[0.1, 0.9], [0.2, 0.6], [0.05, 0.95]], dtype=torch.float64)


def test_sums_and_shares_against_loops() -> None:
    sums, shares = subset_sums(SCORE, MEMBER), subset_shares(SCORE, MEMBER, COMPETING)
    for b in range(B):
        total = sum(math.exp(SCORE[b, n]) for n in range(N) if COMPETING[b, n])
        for m in range(M):
            members = [n for n in range(N) if MEMBER[b, m, n]]
            assert sums[b, m].item() == pytest.approx(sum(SCORE[b, n].item() for n in members))
            share = sum(math.exp(SCORE[b, n]) for n in members if COMPETING[b, n]) / total
            assert shares[b, m].item() == pytest.approx(share)


def test_the_regression_against_a_loop() -> None:
    sums, total = subset_sums(SCORE, MEMBER), 0.0
    for b in range(B):
        for m in range(M):
            error = (sums[b, m] - sums[b].mean()) - (LOSS[b].mean() - LOSS[b, m])
            total += error.item() ** 2 / (B * M)
    assert regression_loss(sums, LOSS).item() == pytest.approx(total)
    # How hard a question is does not matter.
    assert regression_loss(sums, LOSS + torch.tensor([[5.0], [1.0], [0.0]])).item() == pytest.approx(total)


def test_mil_against_a_loop() -> None:
    shares, total = subset_shares(SCORE, MEMBER, COMPETING), 0.0
    for b in range(B):
        low, high = ODDS[b].tolist()
        for m in range(M):
            p, seen = low + (high - low) * shares[b, m].item(), math.exp(-LOSS[b, m].item())
            total -= (seen * math.log(p) + (1 - seen) * math.log(1 - p)) / (B * M)
    p_BM = answer_probabilities(shares, ODDS)
    assert mil_loss(p_BM, LOSS).item() == pytest.approx(total)


def test_the_logarithm_tells_subsets_apart_where_the_answer_is_never_probable() -> None:
    """A model that gives an answer 2 % with its token and 0.2 % without: the logarithm differs by 2.3."""
    member = torch.eye(4, dtype=torch.bool)[None]
    loss = -torch.tensor([[0.02, 0.002, 0.002, 0.002]], dtype=torch.float64).log()
    pulls = []
    for by_log in (False, True):
        score = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        share = subset_shares(score, member, torch.ones(1, 4, dtype=torch.bool))
        p = answer_probabilities(share, torch.tensor([[0.002, 0.02]], dtype=torch.float64))
        (0.2 * regression_loss(p.log(), loss) if by_log else mil_loss(p, loss)).backward()
        assert score.grad is not None and score.grad.argmin().item() == 0  # both raise the right one
        pulls.append(-score.grad[0, 0].item())
    assert pulls[1] > 10 * pulls[0]


@pytest.mark.parametrize("least", [1e-3, 1e-6, 1e-9])
def test_an_improbable_answer_still_teaches(least: float) -> None:
    """A long answer is improbable with every subset; which subset is better must not be lost in a floor."""
    score = torch.tensor([[0.5, 0.0, 0.0, 0.0]], requires_grad=True)
    odds = torch.tensor([[least, 50 * least]], requires_grad=True)
    share = subset_shares(score, torch.eye(4, dtype=torch.bool)[None], torch.ones(1, 4, dtype=torch.bool))
    loss = -torch.tensor([[30 * least, least, least, least]]).log()
    p = answer_probabilities(share, odds)
    (mil_loss(p, loss) + regression_loss(p.log(), loss)).backward()
    assert score.grad is not None and odds.grad is not None
    assert score.grad[0, 0].item() < -0.01 and bool((odds.grad != 0).all()) and bool(odds.grad.isfinite().all())


def test_gradients_are_those_of_finite_differences() -> None:
    def regression(score_BN: Tensor) -> Tensor:
        return regression_loss(subset_sums(score_BN, MEMBER), LOSS)

    def mil(score_BN: Tensor, odds_B2: Tensor) -> Tensor:
        p_BM = answer_probabilities(subset_shares(score_BN, MEMBER, COMPETING), odds_B2)
        return mil_loss(p_BM, LOSS) + regression_loss(p_BM.log(), LOSS)

    score, odds = SCORE.clone().requires_grad_(), ODDS.clone().requires_grad_()
    assert torch.autograd.gradcheck(regression, (score,)) and torch.autograd.gradcheck(mil, (score, odds))


def test_odds_start_near_chance_and_near_certainty() -> None:
    low, high = Odds(words=5)(torch.randn(2, 5)).unbind(-1)
    assert low.tolist() == pytest.approx([0.119] * 2, abs=1e-3) and high.tolist() == pytest.approx(
        [0.895] * 2, abs=1e-3
    )
    assert bool((low < high).all())


def test_gumbel_noise_draws_subsets_without_preference() -> None:
    noise = gumbel((20_000, 5), torch.Generator().manual_seed(0))
    chosen = torch.zeros(20_000, 5).scatter(1, noise.topk(2).indices, 1.0).mean(0)
    assert chosen.tolist() == pytest.approx([0.4] * 5, abs=0.015)
    # The first place goes by the softmax of scores.
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    first = torch.nn.functional.one_hot((scores + noise).argmax(-1), 5).double().mean(0)
    assert first.tolist() == pytest.approx(scores.softmax(0).tolist(), abs=0.015)
