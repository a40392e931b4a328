"""Packed caches: how many bytes, how far off; a prompt does not depend on the others of its batch."""

import pytest
import torch

from experiments.inference import drift
from lavida_adapter import CachePacker, Cast, DecodeConfig, Fp8, Int8, Lavida, Prefix
from tests.lavida_adapter.tiny import noise

P, A, L = 20, 4, 3
N_TOKENS = (20, 13)
MASK = torch.arange(P) < torch.tensor(N_TOKENS)[:, None]
DECODE = DecodeConfig(max_new_tokens=A)


def made(rows: slice = slice(None), mask: torch.Tensor = MASK) -> Prefix:
    embeds = (noise(2, P, 32) * MASK[..., None])[rows]
    n = int(mask[rows].sum(-1).max())
    return Prefix(embeds[:, :n], mask[rows][:, :n], torch.zeros_like(mask[rows][:, :n]))


@torch.inference_mode()
def check_rows_alone(packer: CachePacker, model: Lavida) -> None:
    """A batch answers like its rows alone."""
    together = model.generate(made(), DECODE, cache_packer=packer)
    for b, n in enumerate(N_TOKENS):
        by_itself = model.generate(made(slice(b, b + 1)), DECODE, cache_packer=packer)
        assert torch.equal(together.ids_BA[b], by_itself.ids_BA[0])
        assert by_itself.cache is not None and by_itself.cache.n_slots(0) <= n


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


@pytest.mark.parametrize("packer", [Cast(), Int8(), Fp8()], ids=lambda packer: type(packer).__name__)
def test_a_prompt_does_not_depend_on_its_batch_mates(packer: CachePacker, model: Lavida) -> None:
    check_rows_alone(packer, model)
