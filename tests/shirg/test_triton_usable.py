"""Where Triton does not run, the torch code does, after one warning; where it does, compiled selectors include it."""

import warnings

import pytest
import torch

import shirg.kernels
from shirg.kernels import usable

CUDA = torch.device("cuda", 7)


def test_a_cpu_has_no_kernels_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable(torch.device("cpu"))


def test_one_warning_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a C compiler is found out by a trial launch; here the device does not exist."""

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler\nand more")

    shirg.kernels._usable.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", fail)
    monkeypatch.setattr(shirg.kernels, "find_spec", lambda name: object())
    with pytest.warns(UserWarning, match="do not run on cuda:7, the slower torch code does: ") as caught:
        assert not usable(CUDA) and not usable(CUDA)
    assert len(caught) == 1
    shirg.kernels._usable.cache_clear()


def test_a_compiled_selector_may_ask() -> None:
    """Which kernel runs is decided while torch traces, not in the compiled code."""

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x if usable(x.device) else 2 * x

    torch.compiler.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), 2 * torch.ones(2))
