"""The kernel's tokens and probabilities against torch in float64: in Triton's interpreter, and on the device."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lavida_adapter.sampling import confidence, likeliest

ROOT = Path(__file__).resolve().parents[2]


def cases(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """Small and large vocabularies, ties, a forbidden token, a whole tile of forbidden ones, large logits, a view."""
    generator = torch.Generator().manual_seed(0)
    for b, m, width, scale in ((2, 3, 50, 1.0), (1, 4, 9000, 5.0), (2, 1, 8192, 100.0)):
        logits = (scale * torch.randn(b, m + 1, width, generator=generator)).to(device, dtype)[:, 1:]
        logits[0, 0, [7, 40]] = logits.amax() + 1
        logits[..., 49] = float("-inf")
        logits[-1, -1, : width // 2] = float("-inf")
        yield logits


def largest_error(logits: torch.Tensor) -> float:
    """Relative error of the probabilities; infinite where a token is another one."""
    token, probability = likeliest(logits)
    expected = logits.max(-1).indices
    first = (logits == logits.amax(-1, keepdim=True)).to(torch.int64).argmax(-1)
    if not (
        torch.equal(token, first) and bool((logits.gather(-1, expected[..., None])[..., 0] == logits.amax(-1)).all())
    ):
        return float("inf")
    exact = confidence(logits, token, "low_confidence")
    return float(((probability - exact).abs() / exact).max())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_equals_torch_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads the switch when it is imported."""
    code = (
        "from tests.lavida_adapter.test_likeliest import cases, largest_error\n"
        "errors = [largest_error(logits) for logits in cases()]\n"
        "assert max(errors) < 1e-12, errors\n"
        "print('equal')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_on_the_device(dtype: torch.dtype) -> None:
    for logits in cases("cuda", dtype):
        assert largest_error(logits) < 1e-6
