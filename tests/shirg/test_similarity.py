"""Relevance from plain tensors, against loops."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shirg import cosine_relevance, saliency
from shirg.similarity import ROWS

TOKENS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) + 1
TEXTS = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (3, 4)]
VALID = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
CENTRE = torch.arange(5) / 5


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("agg", ["mean", "max", "pooled"])
@pytest.mark.parametrize("centre", [True, False])
def test_cosines_with_the_words_of_a_question(agg: Any, centre: bool) -> None:
    found = cosine_relevance(TOKENS, TEXTS, agg=agg, centre=centre, valid=VALID, text_centre=CENTRE)
    assert found.shape == (2, 6) and found.dtype == torch.float32
    for picture in range(2):
        mean = TOKENS[picture][VALID[picture]].mean(0) if centre else torch.zeros(5)
        words = TEXTS[picture] - CENTRE
        for token in range(6):
            x = TOKENS[picture, token] - mean
            each = [cosine(x, word) for word in words]
            expected = {"mean": sum(each) / len(each), "max": max(each), "pooled": cosine(x, words.mean(0))}[agg]
            assert float(found[picture, token]) == pytest.approx(expected, abs=1e-6)


def test_a_batch_of_texts_and_no_gradient() -> None:
    x = TOKENS.clone().requires_grad_()
    text = torch.stack([TEXTS[0], TEXTS[1][:3]])
    found = cosine_relevance(x, text)
    assert torch.equal(found, cosine_relevance(TOKENS, list(text))) and not found.requires_grad
    assert not torch.equal(found, cosine_relevance(TOKENS, text, centre=False))


def test_many_tokens_are_taken_in_parts() -> None:
    """More tokens than are widened at a time, in bfloat16: the numbers are those of all at once."""
    n = 2 * ROWS + 5
    x = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) + 2
    valid, words = torch.arange(n)[None] % 3 > 0, torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    before, wide = x.clone(), x.float()
    whole = F.normalize(wide - wide[valid].mean(0), dim=-1) @ F.normalize(words, dim=-1).T
    found = cosine_relevance(x, [words], valid=valid)
    torch.testing.assert_close(found, whole.mean(-1), rtol=0, atol=1e-6)
    assert torch.equal(x, before)


def test_saliency_is_the_distance_to_the_mean_of_valid_tokens() -> None:
    found = saliency(TOKENS, VALID)
    for picture in range(2):
        mean = TOKENS[picture][VALID[picture]].mean(0)
        expected = [1 - cosine(token, mean) for token in TOKENS[picture]]
        assert found[picture].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(saliency(TOKENS), saliency(TOKENS, torch.ones(2, 6, dtype=torch.bool)))
