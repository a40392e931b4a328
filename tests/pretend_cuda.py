"""Tensors that compute on the CPU and say that they are on cuda:0, and a recorder of what a GPU would have to do.

`tests.pretend_machine.pretend()` opens a block in which torch makes such tensors for `device="cuda:0"`. Their values
are real. The recorder counts, with the line of this project that caused it:

- waits: where the host stops until the device has finished: `item`, `tolist`, `bool`, `nonzero`, a bool mask as an
  index, copies from the device, copies to it that block, and larger ones from memory that is not pinned;
- mixed: operations on tensors of both devices, which CUDA refuses;
- launches: one for each operation that computes, one for each Triton kernel, one for each replay of a graph;
- float64, and the largest output in float32 or float64 whose last dimension is the vocabulary.

What this cannot show: times, real kernels, memory, streams that run at once.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shirg.kernels import score

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(f"{ROOT / name}/" for name in ("shirg", "baselines", "lavida_adapter", "experiments"))
SMALL = 512
"""Bytes up to which a copy from memory that is not pinned does not wait. A GPU takes 64 KiB; the tests' prompts and
pictures are about a hundredth of the real ones, and what grows with them must not wait there either."""
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "multinomial", "bincount"}
WAITS |= {"_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
NO_LAUNCH |= {"_fused_sdp_choice", "_assert_async", "lift_fresh", "_local_scalar_dense", "_unsafe_view"}


class Pretended(Tensor):
    """A CPU tensor that says it is on cuda:0."""

    cpu_values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "Pretended":
        made: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device="cpu",
        )
        made.cpu_values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.cpu_values})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Pretended(self.cpu_values)

    @data.setter
    def data(self, new: "Pretended") -> None:
        self.cpu_values = new.cpu_values

    def data_ptr(self) -> int:
        return self.cpu_values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.cpu_values.untyped_storage()

    def tolist(self) -> Any:
        recorder().wait("tolist")
        return self.cpu_values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, **options: Any) -> Tensor:
        """torch would take a CPU wrapper for one that is on the CPU already."""
        copy = options.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **options)
        moved = self if dtype is None or dtype == self.dtype else Tensor.to(self, dtype)
        if device is not None and device.type == "cpu":
            if not non_blocking:  # otherwise torch copies to pinned memory
                recorder().wait(f"copy from the device {tuple(self.shape)}")
            return moved.cpu_values.clone()
        return moved.clone() if copy and moved is self else moved

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with recorder():
            return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Facts:
    """What is known of an operation of torch."""

    name: str
    is_composite: bool
    """Whether it is made of others, which then count."""
    is_view: bool
    """Whether it only gives another shape to the memory of its input."""
    computes: bool
    """Whether a GPU has to launch a kernel for it."""
    writes: int | None
    """The argument that it writes in place."""


@cache
def facts_of(func: Any) -> Facts:
    name, schema = func.overloadpacket.__name__, func._schema
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return Facts(
        name,
        composite and name != "scaled_dot_product_attention",
        is_view,
        not is_view and name not in NO_LAUNCH,
        written[0] if written and not schema.arguments[written[0]].kwarg_only else None,
    )


def each(x: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments or results of an operation with every tensor changed; torch's own function takes most of a test."""
    if isinstance(x, (list, tuple)):
        return type(x)(each(part, change) for part in x)
    if isinstance(x, dict):
        return {key: each(part, change) for key, part in x.items()}
    return change(x) if isinstance(x, Tensor) else x


def tensors_in(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(x, found.append)
    return found


def values_of(x: Any) -> Any:
    return x.cpu_values if isinstance(x, Pretended) else x


def line() -> str:
    """The innermost lines of ours that are running: file:line < file:line of the callers."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            found.append(f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "a test"


class Recorder(TorchDispatchMode):
    """Runs every operation on the CPU values and records what it would be on a GPU."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then does not look for a real GPU

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self._depth = 0
        self.tape: list[tuple[Any, Any, Any, Any]] | None = None
        self.reset()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def reset(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.mixed: Counter[tuple[str, str]] = Counter()
        self.captured_waits: Counter[tuple[str, str]] = Counter()
        self.launched: Counter[str] = Counter()
        self.captured: Counter[str] = Counter()
        self.float64: Counter[tuple[str, str]] = Counter()
        self.wide: dict[tuple[str, str], int] = {}
        self.order: list[str] = []
        """Launches and waits in the order of the host: "launch", "wait"."""

    @property
    def n_waits(self) -> int:
        return sum(self.waits.values())

    @property
    def n_launches(self) -> int:
        return sum(self.launched.values())

    @property
    def widest(self) -> int:
        """Numbers of the largest float32 or float64 output over the vocabulary."""
        return max(self.wide.values(), default=0)

    def wait(self, what: str) -> None:
        (self.waits if self.tape is None else self.captured_waits)[what, line()] += 1
        self.order.append("wait")

    def launch(self, name: str) -> None:
        if self.tape is not None:
            self.captured[name] += 1
            return
        self.launched[name] += 1
        self.order.append("launch")

    def __enter__(self) -> "Recorder":
        self._depth += 1
        if self._depth == 1:
            torch._C._set_only_lift_cpu_tensors(True)
            torch._C._ensureCUDADeviceGuardSet()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        facts = facts_of(func)
        name = facts.name
        if func is torch.ops.prim.device.default:
            return CUDA
        if name == "is_pinned":
            return getattr(args[0], "is_pretended_pinned", False)
        if name in ("pin_memory", "_pin_memory"):
            pinned = args[0].clone()
            pinned.is_pretended_pinned = True
            return pinned
        if func.namespace == "shirg":  # our own operation: the function that launches its kernel
            with self:
                return getattr(score, name)._init_fn(*args, **kwargs)
        if facts.is_composite:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = tensors_in((args, kwargs))
        on_gpu = any(isinstance(t, Pretended) for t in tensors)
        target = kwargs.get("device")
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if on_gpu:
            self._judge(name, func, args, tensors)
        if name in COPIES:
            self._judge_copy(name, args, kwargs, to_gpu)
        if (on_gpu or to_gpu) and facts.computes:
            self.launch(name)
        return self._run(func, facts, args, kwargs, on_gpu or to_gpu)

    def _judge(self, name: str, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Waits and mixed devices of an operation on the device."""
        if name in WAITS or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self.wait(name)
        if name in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and not isinstance(index, Pretended):
                    self.wait(f"{name} by an index of the host")
                elif isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by a bool mask")
        elif name not in COPIES and any(t.dim() and not isinstance(t, Pretended) for t in tensors):
            self.mixed[name, line()] += 1

    def _judge_copy(self, name: str, args: Any, kwargs: Any, to_gpu: bool) -> None:
        source = args[0] if name == "_to_copy" else args[1]
        lands = to_gpu if name == "_to_copy" else isinstance(args[0], Pretended)
        if isinstance(source, Pretended):
            if name == "copy_" and not lands:
                self.wait(f"copy from the device {tuple(source.shape)}")
            return
        if not lands:
            return
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if not getattr(source, "is_pretended_pinned", False):
            waits |= source.numel() * source.element_size() > SMALL
        if waits:
            self.wait(f"copy to the device {tuple(source.shape)}")

    def _run(self, func: Any, facts: "Facts", args: Any, kwargs: Any, lands: bool) -> Any:
        pinned = kwargs.pop("pin_memory", False)
        given, options = each((args, kwargs), values_of)
        if "device" in options and lands:
            options["device"] = torch.device("cpu")
        out = func(*given, **options)
        if pinned:
            out.is_pretended_pinned = True
        if lands and self.tape is not None and not facts.is_view:
            self.tape.append((func, given, options, out))
        if "out" in kwargs:
            return kwargs["out"]
        if facts.writes is not None:  # what is written in place is also returned
            return args[facts.writes]
        return each(out, lambda t: self._wrap(t, facts.name)) if lands else out

    def _wrap(self, t: Tensor, name: str) -> Tensor:
        if t.dtype in (torch.float32, torch.float64) and t.dim() > 0 and t.shape[-1] == self.vocabulary:
            where = (f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}", line())
            self.wide[where] = max(t.numel(), self.wide.get(where, 0))
        if t.dtype == torch.float64:
            self.float64[name, line()] += 1
        return Pretended(t)


current: list[Recorder] = []


def recorder() -> Recorder:
    assert current, "a pretended tensor is used outside of pretend()"
    return current[-1]
