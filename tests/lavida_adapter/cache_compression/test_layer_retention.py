"""Layer retention: what rows receive, what every layer keeps, and the profile."""

import json
from pathlib import Path

import pytest
import torch

from lavida_adapter import Lavida, LayerRetention
from lavida_adapter.attention import attention_weights
from lavida_adapter.cache_compression.layer_retention import FIRST, MassReceived, forgotten, profile
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.kv_cache import RaggedPrefix
from lavida_adapter.prefix_attention import SeenKeys
from tests.lavida_adapter.cache_compression.test_quantize import MASK, N_TOKENS, A, L, P, check_rows_alone, made
from tests.lavida_adapter.tiny import noise


@pytest.fixture
def retention(tmp_path: Path) -> LayerRetention:
    (tmp_path / "p.json").write_text(json.dumps({"forget": [0.1, 0.5, 0.3]}))
    return LayerRetention(profile=str(tmp_path / "p.json"))


def test_a_prompt_does_not_depend_on_its_batch_mates(model: Lavida, retention: LayerRetention) -> None:
    check_rows_alone(retention, model)


@torch.inference_mode()
def test_what_prompts_receive_is_the_column_sum_of_their_attention(model: Lavida) -> None:
    seen, whole = MassReceived(MASK, chunk=3), []
    model.prefill(made(), hook=seen)
    model.prefill(made(), hook=lambda q, k, mask: whole.append(attention_weights(q, k, mask).mean(1)))
    assert len(seen.masses) == len(whole) == L
    for mass_BP, map_BPP in zip(seen.masses, whole, strict=True):
        torch.testing.assert_close(mass_BP, (map_BPP * MASK[..., None]).sum(1), rtol=0, atol=1e-5)
        torch.testing.assert_close(mass_BP.sum(-1), torch.tensor(N_TOKENS).float(), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_every_layer_keeps_its_own_rows_at_their_positions(model: Lavida, retention: LayerRetention) -> None:
    prompt = made()
    seen = MassReceived(MASK)
    cache = model.prefill(prompt, hook=seen)
    kept = retention(cache, prompt, seen)
    assert isinstance(kept, RaggedPrefix)
    assert [kept.n_slots(i) for i in range(L)] == [18, 10, 14]
    for i, share in enumerate((0.1, 0.5, 0.3)):
        for b, n in enumerate(N_TOKENS):
            free = [p for p in range(FIRST, n - 1)]
            free.sort(key=lambda p: -float(seen.masses[i][b, p]))
            expected = sorted([*range(FIRST), n - 1, *free[: n - forgotten(n, share) - FIRST - 1]])
            real = kept.masks[i][b]
            assert kept.positions[i][b, real].tolist() == expected
            assert torch.equal(kept.keys[i][b][:, real], cache.keys[i][b][:, expected])
            assert torch.equal(kept.values[i][b][:, real], cache.values[i][b][:, expected])
    assert kept.n_bytes == sum(2 * 2 * 2 * n * 8 * 4 for n in (18, 10, 14))


@torch.inference_mode()
def test_hidden_rows_equal_rows_that_are_gone(model: Lavida, retention: LayerRetention) -> None:
    """A dense cache in which every layer masks what it forgets gives the same logits."""
    prompt, seen = made(), MassReceived(MASK)
    cache = model.prefill(prompt, hook=seen)
    kept = retention(cache, prompt, seen)
    ids = torch.full((2, A), model.config.lm.mask_token_id)
    hidden = DecodeSteps(model.lm, cache, A)
    assert isinstance(kept, RaggedPrefix)
    for i in range(L):
        seen_BP = torch.zeros(2, P, dtype=torch.bool)
        for b in range(2):
            seen_BP[b, kept.positions[i][b, kept.masks[i][b]]] = True
        hidden._seen[i] = SeenKeys.of(seen_BP, A)
    torch.testing.assert_close(DecodeSteps(model.lm, kept, A)(ids), hidden(ids), rtol=0, atol=1e-5)


def test_a_profile_keeps_one_share_of_attention_and_meets_its_budget() -> None:
    """The first layer looks at everything alike, the second at a few rows: it can forget more."""
    flat = torch.ones(100) + 0.01 * noise(100)
    peaked = torch.cat([torch.full((10,), 20.0), torch.ones(90)])
    shares = profile([[flat, peaked], [flat.flip(0), peaked.roll(7)]], 0.4)
    assert sum(shares) / 2 == pytest.approx(0.4, abs=0.02) and shares[1] > shares[0] + 0.2
    assert profile([[flat, flat]], 0.5) == pytest.approx([0.5, 0.5])
