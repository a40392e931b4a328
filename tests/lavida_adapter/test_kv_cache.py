"""The prefix cache: written once, self-describing, repeatable."""

from dataclasses import replace

import pytest
import torch

from lavida_adapter import DecodeConfig, Prefix
from lavida_adapter.llada import Llada
from tests.lavida_adapter.tiny import noise, tiny_model

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture
def lm() -> Llada:
    return tiny_model().lm


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["unequal", "equal"])
def test_a_whole_generation_leaves_it_alone(mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prefill, and the same numbers in it after the last denoising step."""
    model = tiny_model()
    prefix = Prefix(noise(2, 5, 32), mask, torch.zeros_like(mask))
    caches = []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda *a: (caches.append(prefill(*a)), caches[-1])[1])
    out = model.generate(prefix, DecodeConfig(max_new_tokens=6))
    assert out.forwards == 6
    assert len(caches) == 1
    with torch.no_grad():
        assert caches[0].digest() == prefill(prefix).digest()


@torch.no_grad()
@pytest.mark.parametrize("what", ["keys", "values"])
def test_the_digest_sees_every_number(lm: Llada, what: str) -> None:
    cache = lm.prefill(noise(2, 5, 32))
    changed = [tensor.clone() for tensor in getattr(cache, what)]
    changed[-1][1, 3, 4, 7] += 1e-6
    assert replace(cache, **{what: tuple(changed)}).digest() != cache.digest()
    assert replace(cache).digest() == cache.digest()


@torch.no_grad()
def test_the_digest_of_bfloat16() -> None:
    lm = tiny_model().lm.to(torch.bfloat16)
    cache = lm.prefill(noise(1, 5, 32).to(torch.bfloat16))
    assert len(cache.digest()) == 64
    assert cache.n_bytes == 2 * 2 * 5 * 32 * 2


@torch.no_grad()
def test_positions_and_shapes(lm: Llada) -> None:
    cache = lm.prefill(noise(2, 5, 32), MASK)
    assert [k.shape for k in (*cache.keys, *cache.values)] == [(2, 4, 5, 8)] * 4
    assert cache.positions_BP.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert cache.next_position_B.tolist() == [3, 5]
    assert cache.n_bytes == 4 * 2 * 4 * 5 * 8 * 4


@torch.no_grad()
def test_repeat_serves_several_answers_to_one_prefix(lm: Llada) -> None:
    cache = lm.prefill(noise(2, 5, 32), MASK)
    answers = noise(6, 4, 32, seed=1)
    together = lm.decode(answers, cache.repeat(3))
    alone = torch.cat([lm.decode(answers[i : i + 2], cache) for i in (0, 2, 4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert cache.repeat(3).next_position_B.tolist() == [3, 5] * 3
