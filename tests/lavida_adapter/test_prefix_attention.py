"""The attention kernel of a step against the same in torch: in Triton's interpreter everywhere, and on the device."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lavida_adapter.attention import attend
from lavida_adapter.prefix_attention import PromptSlots, SeenKeys, attend_prompt, by_kernel, splits_for

ROOT = Path(__file__).resolve().parents[2]
Case = tuple[Tensor, tuple[Tensor, Tensor], PromptSlots, tuple[Tensor, Tensor]]


def cases(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Heads that share keys, widths and lengths that are no powers of two, holes in masks, fewer queries than keys."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for b, heads, kv, queries, own, slots, width in ((2, 4, 4, 6, 6, 100, 8), (3, 14, 2, 5, 37, 200, 24)):
        q = draw(b, own, heads, width).transpose(1, 2)[:, :, :queries]
        prompt = draw(b, kv, slots, width), draw(b, kv, slots, width)
        used, n = PromptSlots.blank(b, slots, torch.device(device)), slots - 9
        mask = torch.rand(b, n, generator=generator) > 0.3
        mask[0] = torch.arange(n) < 3  # one prompt is much shorter than the others
        used.fill(n, mask.to(device))
        yield q, prompt, used, (draw(b, kv, own, width), draw(b, kv, own, width))


def with_unused_slots(case: Case) -> Case:
    """Other numbers in the holes of the mask, NaN behind the last slot that is used."""
    q, prompt, used, answer = case
    unused_B1S1 = ~used.seen_BS[:, None, :, None]
    behind_B1S1 = (torch.arange(used.seen_BS.shape[1], device=q.device) >= used.end_B[:, None])[:, None, :, None]
    keys, values = (t.masked_fill(unused_B1S1, 50.0).masked_fill(behind_B1S1, float("nan")) for t in prompt)
    return q, (keys, values), used, answer


def largest_difference(case: Case, splits: int) -> float:
    return float(
        (by_kernel(*with_unused_slots(case), splits=splits).float() - attend_prompt(*case).float()).abs().max()
    )


def difference_in_one_buffer(case: Case) -> float:
    """Slots of prompt and answer in one buffer, as single steps have them: our kernel against torch with a mask."""
    q, prompt, used, answer = case
    keys, values = (torch.cat(both, dim=2) for both in zip(prompt, answer, strict=True))
    seen = SeenKeys.of(used.seen_BS, answer[0].shape[2])
    assert seen.mask is not None
    by_torch = SeenKeys(seen.mask).attend(q, keys, values, "sdpa")
    found = replace(seen, used=PromptSlots.of(used.seen_BS)).attend(q, keys, values, "flash")
    return float((found.float() - by_torch.float()).abs().max())


def test_torch_sees_the_used_slots_and_the_answer() -> None:
    for case in cases():
        q, (keys, values), used, (own_k, own_v) = case
        for row in range(len(q)):
            seen = used.seen_BS[row]
            k, v = (
                torch.cat([part[row : row + 1, :, seen], own[row : row + 1]], dim=2)
                for part, own in ((keys, own_k), (values, own_v))
            )
            expected = attend(q[row : row + 1], k, v, None, "math").transpose(1, 2)
            torch.testing.assert_close(attend_prompt(*case)[row : row + 1], expected, rtol=0, atol=1e-5)
            assert int(used.end_B[row]) == int(seen.nonzero().max()) + 1
        for backend in ("math", "flash"):
            torch.testing.assert_close(attend_prompt(*case, backend), attend_prompt(*case), rtol=0, atol=1e-5)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_the_kernel_equals_torch_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads the switch when it is imported."""
    code = (
        "from tests.lavida_adapter.test_prefix_attention import cases, difference_in_one_buffer, largest_difference\n"
        "assert all(largest_difference(case, splits) < 1e-5 for case in cases() for splits in (1, 3, 8))\n"
        "assert all(difference_in_one_buffer(case) < 1e-5 for case in cases())\n"
        "print('equal')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_splits_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavida_adapter.prefix_attention._multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert splits_for(32, 18, device) == 4, "one prompt of 32 heads"
    assert splits_for(16, 18, device) == 8, "one prompt of 28 heads that share four heads of keys, in 16 pieces"
    assert splits_for(32, 3, device) == 3, "not more than there are tiles of keys"
    assert splits_for(512, 18, device) == 1 and splits_for(4, 100, device) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_kernel_equals_torch_on_the_device(dtype: torch.dtype, most: float) -> None:
    for case in cases("cuda", dtype):
        for splits in (1, 3, 8):
            assert largest_difference(case, splits) < most
        assert difference_in_one_buffer(case) < most
