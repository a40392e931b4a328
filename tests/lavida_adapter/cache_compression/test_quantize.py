"""Packed caches: how many bytes, how far off; a prompt does not depend on the others of its batch; their kernels."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from experiments.inference import drift
from lavida_adapter import CachePacker, Cast, DecodeConfig, Fp8, Int8, Lavida, Prefix
from lavida_adapter.cache_compression.compressor import Packed, PackedPrefix
from lavida_adapter.engine import DecodeSteps
from tests.lavida_adapter.tiny import noise

ROOT = Path(__file__).resolve().parents[3]

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


def packs(device: str = "cpu") -> Iterator[tuple[Int8 | Fp8, Packed, torch.dtype, torch.Tensor]]:
    """Packers, what they packed, the model's dtype, and where it goes: the first slots of a larger buffer.

    Widths and groups that are no powers of two, more numbers than a program unpacks; all codes of fp8, negative zero
    and those below its normal numbers among them.
    """
    for b, h, p, d in ((2, 3, 5, 24), (1, 2, 70, 16)):
        x = noise(b, p, h, d).transpose(1, 2).to(device)
        codes = torch.arange(b * h * p * d, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        every = codes.view(b, h, p, d), 1.0 + noise(b, h, 1, 1).abs().to(device)
        # Triton's interpreter cuts numbers off where a GPU rounds them to bfloat16.
        for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])):
            for packer, packed in (
                *((packer, packer.pack(x.to(dtype), None)) for packer in (Int8(group=7), Int8(group=64), Fp8())),
                (Fp8(), every),
            ):
                yield packer, packed, dtype, torch.full((b, h, p + 4, d), 9.0, dtype=dtype, device=device)[:, :, :p]


def kernels_agree(device: str = "cpu") -> bool:
    """To the bit: the product of a code and a float16 is exact in float32, so there is one rounding in both."""
    for packer, packed, dtype, out in packs(device):
        packer.unpack_by_kernel(packed, out)
        same = torch.equal(out.nan_to_num(7.0), packer.unpack(packed, dtype).nan_to_num(7.0))
        if not same or not (out._base[:, :, out.shape[2] :] == 9).all():
            return False
    return True


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_the_kernels_equal_torch_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads the switch when it is imported."""
    code = (
        "from tests.lavida_adapter.cache_compression.test_quantize import kernels_agree\n"
        "assert kernels_agree()\n"
        "print('equal')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_equal_torch_on_the_device() -> None:
    assert kernels_agree("cuda")


@torch.inference_mode()
@pytest.mark.parametrize("packer", [Cast(), Int8(), Fp8()], ids=lambda packer: type(packer).__name__)
def test_a_step_unpacks_each_layer_once_where_attention_reads_it(
    packer: CachePacker, model: Lavida, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = made()
    packed = packer(model.prefill(prompt), prompt, None)
    assert isinstance(packed, PackedPrefix)
    steps, written = DecodeSteps(model.lm, packed, A), []
    unpack = type(packer).unpack_into
    monkeypatch.setattr(
        type(packer), "unpack_into", lambda self, p, out: written.append(out.data_ptr()) or unpack(self, p, out)
    )
    steps(torch.full((2, A), model.config.lm.mask_token_id))
    (keys,), (values,) = steps.reader.slots.keys, steps.reader.slots.values
    assert written == [keys.data_ptr(), values.data_ptr()] * L
    for found, expected in zip((keys, values), packed.layer(L - 1), strict=True):
        assert torch.equal(found[:, :, :P], expected)
