"""LLaDA's candidates and confidence, by hand and in float32 against float64."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from lavida_adapter.decode_config import Rule
from lavida_adapter.sampling import Draw, candidates, commit_tokens, confidence, is_clear, topk_confident
from tests.lavida_adapter.tables import LOGITS, TABLE
from tests.lavida_adapter.tiny import noise

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


def one_by_one(confidence_BM: torch.Tensor, open_BM: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """The twin: in each row the largest open slot that is not taken yet, of equal ones the first, k times."""
    taken_BM = torch.zeros_like(open_BM)
    for row, k in enumerate(ks):
        for _ in range(k):
            left = confidence_BM[row].masked_fill(~open_BM[row] | taken_BM[row], float("-inf")).tolist()
            taken_BM[row, left.index(max(left))] = True
    return taken_BM


def ranked_cases(device: str = "cpu") -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Confidences, open slots and numbers of tokens: equal and unequal ones, none, all; few values, so many ties."""
    generator = torch.Generator().manual_seed(0)
    for levels in (3, 10**6):
        for ks in ([2, 2, 2, 2], [0, 1, 3, 7], [5, 0, 0, 5]):
            open_BM = torch.rand(4, 32, generator=generator) < 0.7
            values_BM = torch.randint(levels, (4, 32), generator=generator).double() / levels
            yield values_BM.to(device), open_BM.to(device), ks
            yield values_BM.to(device), open_BM.to(device), open_BM.sum(-1).tolist()


def test_rows_are_ranked_at_once_like_one_by_one() -> None:
    for values, here, ks in ranked_cases():
        assert torch.equal(topk_confident(values, here, ks), one_by_one(values, here, ks))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_of_equal_ones_the_device_takes_the_first_too() -> None:
    for values, here, ks in ranked_cases("cuda"):
        by_topk = torch.zeros_like(here)
        for row, k in enumerate(ks):
            by_topk[row, values[row].masked_fill(~here[row], float("-inf")).topk(k).indices] = True
        assert torch.equal(topk_confident(values, here, ks), by_topk)
