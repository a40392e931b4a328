"""Smaller prefix caches: how many bytes, how far off, and that a prompt does not depend on its batch-mates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.inference import drift
from lavida_adapter import CachePacker, Cast, DecodeConfig, Fp8, Int8, Lavida, LayerRetention, Prefix
from lavida_adapter.cache_compression.layer_retention import FIRST, MassReceived, RaggedPrefix, forgotten, profile
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.llada import attention_weights
from tests.lavida_adapter.tiny import noise, tiny_model

P, A, L = 20, 4, 3
N_TOKENS = (20, 13)
MASK = torch.arange(P) < torch.tensor(N_TOKENS)[:, None]
DECODE = DecodeConfig(max_new_tokens=A)


@pytest.fixture
def model() -> Lavida:
    return tiny_model(lm={"n_layers": L, "n_kv_heads": 2})


@pytest.fixture
def retention(tmp_path: Path) -> LayerRetention:
    (tmp_path / "p.json").write_text(json.dumps({"forget": [0.1, 0.5, 0.3]}))
    return LayerRetention(profile=str(tmp_path / "p.json"))


def made(rows: slice = slice(None), mask: torch.Tensor = MASK) -> Prefix:
    embeds = (noise(2, P, 32) * MASK[..., None])[rows]
    n = int(mask[rows].sum(-1).max())
    return Prefix(embeds[:, :n], mask[rows][:, :n], torch.zeros_like(mask[rows][:, :n]))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("packer", "share", "error"),
    [
        (Cast(), 1 / 2, 2**-8),
        (Cast(dtype="float16"), 1 / 2, 2**-11),
        (Int8(group=8), 3 / 8, 1 / 255),
        (Fp8(), 1 / 4, 1 / 14),
    ],
    ids=["bfloat16", "float16", "int8", "fp8"],
)
def test_bytes_and_errors(packer: CachePacker, share: float, error: float, model: Lavida) -> None:
    prompt = made()
    cache = model.prefill(prompt)
    packed = packer(cache, prompt, None)
    extra = 2 * L * 2 * 2 * 4 if isinstance(packer, Fp8) else 0  # a float32 for each of two heads of two prompts
    assert packed.n_bytes == share * cache.n_bytes + extra
    for i in range(L):
        for whole, back in zip(cache.layer(i), packed.layer(i), strict=True):
            off = ((whole - back).abs() * MASK[:, None, :, None]).max()
            assert 0 < off <= error * whole.abs().max()
    moved = drift(model.lm, cache, packed, A)
    assert all(0 < most < 2 for most in moved.most) and all(same >= 0.5 for same in moved.same_top1)


@torch.inference_mode()
@pytest.mark.parametrize("group", [5, 8, 64])
def test_groups_that_do_not_divide_a_token(group: int) -> None:
    x, packer = noise(2, 2, 3, 8), Int8(group=group)
    back = packer.unpack(packer.pack(x, None), torch.float32)
    assert back.shape == x.shape and (x - back).abs().max() < 0.02
    constant = packer.unpack(packer.pack(torch.full_like(x, 0.5), None), torch.float32)
    assert torch.equal(constant, torch.full_like(x, 0.5))


@torch.inference_mode()
def test_int8_is_eight_and_a_half_bits() -> None:
    x = noise(1, 2, 10, 64)
    assert sum(t.numel() * t.element_size() for t in Int8().pack(x, None)) * 8 == 8.5 * x.numel()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["cast", "int8", "fp8", "retention"])
def test_a_prompt_does_not_depend_on_its_batch_mates(name: str, model: Lavida, retention: LayerRetention) -> None:
    packer = {"cast": Cast(), "int8": Int8(), "fp8": Fp8(), "retention": retention}[name]
    together = model.generate(made(), DECODE, cache_packer=packer)
    for b, n in enumerate(N_TOKENS):
        by_itself = model.generate(made(slice(b, b + 1)), DECODE, cache_packer=packer)
        assert torch.equal(together.ids_BA[b], by_itself.ids_BA[0])
        assert by_itself.cache is not None and by_itself.cache.n_slots(0) <= n


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
        seen_BP = torch.zeros(2, P + A, dtype=torch.bool)
        seen_BP[:, P:] = True
        for b in range(2):
            seen_BP[b, kept.positions[i][b, kept.masks[i][b]]] = True
        hidden._masks[i] = seen_BP[:, None, None]
    torch.testing.assert_close(DecodeSteps(model.lm, kept, A)(ids), hidden(ids), rtol=0, atol=1e-5)


def test_a_profile_keeps_one_share_of_attention_and_meets_its_budget() -> None:
    """The first layer looks at everything alike, the second at a few rows: it can forget more."""
    flat = torch.ones(100) + 0.01 * noise(100)
    peaked = torch.cat([torch.full((10,), 20.0), torch.ones(90)])
    shares = profile([[flat, peaked], [flat.flip(0), peaked.roll(7)]], 0.4)
    assert sum(shares) / 2 == pytest.approx(0.4, abs=0.02) and shares[1] > shares[0] + 0.2
    assert profile([[flat, flat]], 0.5) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"prefix_cache": False}, "Int8 packs the prefix cache, and decode.prefix_cache=false has none"),
        ({"engine": "compile"}, "Int8 is unpacked at every step: choose decode.engine=eager"),
    ],
)
def test_what_cannot_be(knobs: dict[str, bool], sentence: str, model: Lavida) -> None:
    with pytest.raises(ValueError, match=sentence):
        model.generate(made(), replace(DECODE, **knobs), cache_packer=Int8())


def test_bad_knobs(tmp_path: Path, model: Lavida) -> None:
    with pytest.raises(ValueError, match="dtype='int4': choose bfloat16 or float16"):
        Cast(dtype="int4")
    with pytest.raises(ValueError, match="group=0: give how many numbers share a scale"):
        Int8(group=0)
    with pytest.raises(FileNotFoundError, match="profile_cache` writes one"):
        LayerRetention(profile=str(tmp_path / "none.json"))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a profile"):
        LayerRetention(profile=str(tmp_path / "x.json"))
    (tmp_path / "two.json").write_text('{"forget": [0.1, 0.2]}')
    with pytest.raises(ValueError, match="for a model with 2 layers, this one has 3: profile this model"):
        model.generate(made(), DECODE, cache_packer=LayerRetention(profile=str(tmp_path / "two.json")))
