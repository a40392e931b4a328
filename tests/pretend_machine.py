"""A machine with a pretended GPU: CUDA graphs, streams and Triton kernels without CUDA.

A CUDA graph is a list of the operations that ran while it was captured. Replaying runs them again on the same tensors,
so a graph that reads anything that is not at a fixed address gives wrong numbers here too. A wait during a capture is
recorded as one that CUDA would refuse.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavida_adapter import joined_prompts, prefix_attention, step_triton
from lavida_adapter.attention import attend
from lavida_adapter.cache_compression.quantize import Fp8, Int8
from shirg import kernels
from shirg.kernels import score
from tests.pretend_cuda import CUDA, Pretended, Recorder, current, recorder, tensors_in, values_of

MULTIPROCESSORS = 132
"""Of an H100."""


class Graph:
    """A CUDA graph: what ran while it was captured, to be run again on the same tensors."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        recorder().launch("replay")
        with torch._C._DisableTorchDispatch():
            for func, args, kwargs, out in self.tape:
                again = func(*args, **kwargs)
                for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                    if old is not new:
                        old.copy_(new)


@contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    recorder().tape = graph.tape
    try:
        yield
    finally:
        recorder().tape = None


class Kernel:
    """In place of a Triton kernel: one launch, whose outputs a function in torch writes."""

    def __init__(self, name: str, twin: Callable[..., None]) -> None:
        self.name, self.twin = name, twin

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            given = [values_of(argument) for argument in args]
            recorder().launch(self.name)
            with torch._C._DisableTorchDispatch():
                self.twin(*given, **options)
            tape = recorder().tape
            if tape is not None:
                tape.append((self.twin, given, options, None))

        return launch


def _likeliest(rows: Tensor, token: Tensor, probability: Tensor, *_: Any, **__: Any) -> None:
    best = rows.double().softmax(-1).max(-1)
    token.copy_(rows.max(-1).indices)
    probability.copy_(best.values)


def _attend(*given: Any, **_: Any) -> None:
    q, k, v, own_k, own_v, seen, _, out = given[:8]
    keys, values = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
    mask = torch.cat([seen, torch.ones(len(seen), own_k.shape[2], dtype=torch.bool)], dim=1)[:, None, None]
    out.copy_(attend(q, keys, values, mask, "math").transpose(1, 2))


def _unpack_int8(codes: Tensor, low: Tensor, scale: Tensor, out: Tensor, *_: Any, GROUP: int, **__: Any) -> None:
    out.copy_(Int8(group=GROUP).unpack((codes, low, scale), out.dtype))


def _unpack_fp8(codes: Tensor, scale: Tensor, out: Tensor, *_: Any, **__: Any) -> None:
    out.copy_(Fp8().unpack((codes.view(torch.float8_e4m3fn), scale), out.dtype))


def _varlen(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, q_bound: Tensor, bound: Tensor, *_: Any) -> Tensor:
    """The flash kernel of torch for prompts one behind the other."""
    out_QHD = torch.empty_like(q_QHD)
    Kernel("varlen_attn", _attend_each)[()](q_QHD, k_TGD, v_TGD, q_bound, bound, out_QHD)
    return out_QHD


def _attend_each(q: Tensor, k: Tensor, v: Tensor, q_bound: Tensor, bound: Tensor, out: Tensor) -> None:
    rows, keys = (torch.diff(ends).tolist() for ends in (q_bound, bound))
    parts = zip(q.split(rows), k.split(keys), v.split(keys), out.split(rows), strict=True)
    for *given, place in parts:
        place.copy_(attend(*(x.transpose(0, 1)[None] for x in given), None)[0].transpose(0, 1))


def _score(*given: Any, **_: Any) -> None:
    """Not the neighbour terms, but numbers to rank by; the kernel itself has tests of its own."""
    relevance, out = given[3], given[6]
    out.copy_(relevance)


class _Generator(torch.Generator):
    """Draws on the CPU."""

    @property
    def device(self) -> torch.device:
        return CUDA


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel on CUDA, where torch takes five on a CPU; with a gradient the five stand for forward and backward."""
    if torch.is_grad_enabled():
        return _RMS_NORM(x, shape, weight, eps)
    out = torch.empty_like(x)
    Kernel("rms_norm", _norm)[()](x, out, shape, weight, eps)
    return out


def _norm(x: Tensor, out: Tensor, *options: Any) -> None:
    out.copy_(_RMS_NORM(x, *options))


_RMS_NORM = F.rms_norm


class _Stream:
    def wait_stream(self, _: Any) -> None: ...


class _NoGrad:
    """In place of inference mode, whose tensors torch does not let a subclass view."""

    def __init__(self, mode: bool) -> None:
        self._mode, self._before = mode, torch.is_grad_enabled()

    def __enter__(self) -> None:
        torch._C._set_grad_enabled(not self._mode)

    def __exit__(self, *_: Any) -> None:
        torch._C._set_grad_enabled(self._before)


def _nothing(*_: Any, **__: Any) -> Any:
    return nullcontext()


@contextmanager
def pretend(vocabulary: int = 0, *, triton: bool = True) -> Iterator[Recorder]:
    """A block in which cuda:0 is there, with a device that runs our Triton kernels or none."""
    found = Recorder(vocabulary)
    splitting = Kernel("attend_kernel", _attend), Kernel("merge_kernel", lambda *_, **__: None)
    generators = {"cpu": torch.Generator, "cuda": _Generator}
    stubs: dict[Any, dict[str, Any]] = {
        torch: {"Generator": lambda device="cpu": generators[torch.device(device).type]()},
        torch._C: {"_InferenceMode": _NoGrad},
        F: {"rms_norm": _rms_norm},
        torch.cuda: {
            "device": _nothing,
            "stream": _nothing,
            "Stream": lambda *_: _Stream(),
            "current_stream": lambda *_: _Stream(),
            "CUDAGraph": Graph,
            "graph": capture,
            "graph_pool_handle": lambda: (0, 1),
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
        },
        kernels: {"_usable": lambda device: triton and device.type == "cuda"},
        score: {"_kernel": lambda: Kernel("score_kernel", _score)},
        prefix_attention: {"_kernels": lambda: splitting, "_multiprocessors": lambda _: MULTIPROCESSORS},
        joined_prompts: {
            "_has_varlen": lambda device, dtype, _: device.type == "cuda" and dtype == torch.bfloat16,
            "_function_of": lambda _: _varlen,
        },
        step_triton: {
            "likeliest_kernel": Kernel("likeliest_kernel", _likeliest),
            "unpack_int8_kernel": Kernel("unpack_int8_kernel", _unpack_int8),
            "unpack_fp8_kernel": Kernel("unpack_fp8_kernel", _unpack_fp8),
        },
    }
    with ExitStack() as stack:
        for module, replaced in stubs.items():
            stack.enter_context(patch.multiple(module, **replaced))
        current.append(found)
        try:
            with found:
                yield found
        finally:
            current.pop()


def move(module: nn.Module) -> None:
    """Moves a module to the pretended device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                learns = parameter.requires_grad
                part._parameters[name] = nn.Parameter(Pretended(values_of(parameter).detach()), requires_grad=learns)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Pretended(values_of(buffer))
