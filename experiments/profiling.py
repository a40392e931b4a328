"""Memory and time of a job: peaks, out-of-memory messages, a clock, times that no device can reach."""

import gc
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from filelock import FileLock

from experiments.atomic_files import clear_temporaries, read_json, write_json
from experiments.errors import ConfigError
from shirg import UserError

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement

    from lavida_adapter import LanguageModelConfig, Lavida


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory allocated on the accelerator; None on a CPU, where the process holds more than this job."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def peak_mib(device: torch.device) -> float:
    """Peak memory for the progress line of a training: of the accelerator, or on a CPU of the whole process."""
    on_device = peak_memory_mib(device)
    if on_device is not None:
        return on_device
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is a CUDA device if there is one, else the CPU; processes that share a machine take one device each."""
    if local_rank and name.startswith("cuda:"):
        raise UserError(f"device={name}: processes that train together take a device each; give device=cuda")
    if name == "auto" or (name == "cuda" and local_rank):
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        if local_rank >= (count := torch.cuda.device_count()) and name != "cpu":
            raise UserError(
                f"process {local_rank} of this machine sees {count} CUDA devices: start one process for each device "
                "(under SLURM, with --gpus-per-node rather than --gpus-per-task)"
            )
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"device={name}: give auto, cpu, cuda or cuda:N")
    # With its number: torch makes no device without one the current one.
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= torch.cuda.device_count()):
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return device


def use_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of `resolve_device`, made CUDA's current one: kernels and graphs are launched on that."""
    device = resolve_device(name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Timing:
    """Repeated runs of one call, in milliseconds."""

    wall: "Measurement"
    """Wall-clock time, with the device synchronised before and after each run."""
    cpu_ms: tuple[float, ...]
    """Time of all threads of this process, which other processes disturb less; empty on CUDA."""

    @classmethod
    def of(cls, runs: Sequence[tuple[float, float]], device: torch.device) -> Self:
        """Of the seconds that `time_once` gave for each run."""
        from torch.utils.benchmark import Measurement, TaskSpec

        wall_s, cpu_s = zip(*runs, strict=True)
        wall = Measurement(1, list(wall_s), TaskSpec("call()", "", num_threads=torch.get_num_threads()))
        return cls(wall, () if device.type == "cuda" else tuple(1000 * seconds for seconds in cpu_s))

    @property
    def median(self) -> float:
        return 1000 * self.wall.median

    @property
    def least(self) -> float:
        return 1000 * min(self.wall.times)

    def report(self) -> dict[str, Any]:
        return {
            "ms": self.median,
            "ms_min": self.least,
            "ms_iqr": 1000 * self.wall.iqr,
            "cpu_ms": float(np.median(self.cpu_ms)) if self.cpu_ms else None,
            "ms_all": [1000 * seconds for seconds in self.wall.times],
        }


def time_once(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call by the clock of torch.utils.benchmark, which synchronises CUDA, and of all threads."""
    from torch.utils.benchmark import timer  # a tenth of a second to import

    cpu_began, wall_began = time.process_time(), timer()
    call()
    return timer() - wall_began, time.process_time() - cpu_began


def time_call(call: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 2) -> Timing:
    """Times single calls, which take milliseconds to seconds; `warm_up` calls are not counted."""
    runs = [time_once(call) for _ in range(warm_up + repeats)]
    return Timing.of(runs[warm_up:], device)


LIMITS = "limits.json"
NOISE = 0.1
"""A time that is less than this share below its floor is within the noise of both. On two cores, the better of two
measurements of the limits was 4 to 6 % above that of the next two, for one of three limits 9 %."""
COPY_BYTES = {"cpu": (2**22, 2**25), "cuda": (2**26, 2**32)}
"""Buffers to copy: one that caches may hold, one that they cannot."""
SQUARES = {"cpu": (512,), "cuda": (4096, 8192)}
"""Sides of the matrices to multiply."""


@dataclass(frozen=True)
class Work:
    """The least that a stage costs."""

    flops: float
    """Multiplications and additions of its matrix products."""
    bytes: float
    """Weights and cached keys and values, each moved once."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, n: float) -> "Work":
        return Work(n * self.flops, n * self.bytes)


@dataclass(frozen=True)
class Limits:
    """The best rates that were measured on a device."""

    copy: Mapping[int, float]
    """Bytes moved per second, read and written ones, by size of the buffer."""
    matmul: float
    """Floating-point operations per second, in the type of the model."""

    @property
    def fastest_copy(self) -> float:
        return max(self.copy.values())

    def copy_rate(self, n_bytes: float) -> float:
        """The rate at which so many bytes can be moved: data that fits into caches moves faster."""
        return self.copy[max((size for size in self.copy if size <= n_bytes), default=min(self.copy))]

    def floor_ms(self, work: Work, *, lenient: bool = False) -> float:
        """Milliseconds that the work takes at least; `lenient` as if everything lay in a cache."""
        rate = self.fastest_copy if lenient else self.copy_rate(work.bytes)
        return 1000 * max(work.flops / self.matmul, work.bytes / rate)

    def report(self) -> dict[str, Any]:
        return {"copy": {str(size): rate for size, rate in self.copy.items()}, "matmul": self.matmul}

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Self:
        """From what `report` wrote. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        return cls({int(size): float(rate) for size, rate in report["copy"].items()}, float(report["matmul"]))

    def better(self, other: "Limits") -> "Limits":
        """The higher of two measurements of each limit: another process slows a measurement, and nothing speeds it."""
        copy = {size: max(rate, other.copy.get(size, rate)) for size, rate in self.copy.items()}
        return Limits(copy, max(self.matmul, other.matmul))


def measure_limits(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> Limits:
    """Times copies and square matrix products on the device, and takes the best of each."""
    copy = {}
    for size in COPY_BYTES[device.type]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy[size] = 2 * size / _best_s(lambda s=source, t=target: t.copy_(s), device, repeats)  # type: ignore[misc]
    matmul = 0.0
    for n in SQUARES[device.type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        matmul = max(matmul, 2 * n**3 / _best_s(lambda a=a, b=b: a @ b, device, repeats))  # type: ignore[misc]
    return Limits(copy, matmul)


def best_limits(folder: Path, device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures the limits of this device now; returns the best of this and all earlier measurements of the folder.

    A job measures before and after what is judged. The limits of each device, type and number of threads are in
    `limits.json`, and only rise: a slow minute of the machine refuses no figure of a faster one.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    key = f"{name}, {str(dtype).removeprefix('torch.')}"
    found = measure_limits(device, dtype)
    with FileLock(folder / f".{LIMITS}.lock"):
        known: dict[str, Any] = {}
        try:
            known = read_json(folder / LIMITS) or {}
            if key in known:
                found = found.better(Limits.of(known[key]))
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError):  # damaged: all of it is measured again
            known = {}
        clear_temporaries(folder, only=LIMITS)
        write_json(folder / LIMITS, {**known, key: found.report()})
    return found


def _best_s(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    with torch.inference_mode():
        return time_call(call, device, repeats=repeats, warm_up=1).least / 1000


@dataclass(frozen=True)
class LmCost:
    """Counts of one language model's stages. Attention counts its two products, nothing else of it."""

    d_model: int
    kv_width: int
    mlp: int
    n_layers: int
    vocab: int
    item_bytes: int
    shift: int = 0
    """Above 0 the last token of a prompt predicts the first one of the answer (`LanguageModel.shift`)."""

    @property
    def block_weights(self) -> int:
        return 2 * self.d_model * (self.d_model + self.kv_width) + 3 * self.d_model * self.mlp

    @property
    def kv_weights(self) -> int:
        return 2 * self.d_model * self.kv_width

    def cache_bytes(self, p: float, batch: int = 1) -> float:
        return 2 * self.n_layers * self.kv_width * p * batch * self.item_bytes

    def prefill(self, p: float, batch: int = 1) -> Work:
        """The last block delivers keys and values only; with a shift also the state of the prompt's last token."""
        blocks, rest = self.n_layers - 1, self.block_weights - self.kv_weights
        per_row = blocks * (2 * p * self.block_weights + 4 * p * p * self.d_model) + 2 * p * self.kv_weights
        weights = (blocks * self.block_weights + self.kv_weights) * self.item_bytes
        if self.shift:
            per_row += 2 * rest + 4 * p * self.d_model
            weights += rest * self.item_bytes
        return Work(batch * per_row, weights + self.cache_bytes(p, batch))

    def step(self, p: float, a: int, m: float, batch: int = 1, cache_bytes: float | None = None) -> Work:
        """One denoising step of `a` answer tokens, of which `m` need the last block's output and logits.

        `cache_bytes`: what the whole batch's cache takes, when it is not stored in the model's own type.
        """
        last = 2 * a * self.kv_weights + 2 * m * (self.block_weights - self.kv_weights)
        attention = 4 * (p + a) * self.d_model * ((self.n_layers - 1) * a + m)
        head = 2 * m * self.d_model * self.vocab
        per_row = (self.n_layers - 1) * 2 * a * self.block_weights + last + attention + head
        weights = (self.n_layers * self.block_weights + self.d_model * self.vocab) * self.item_bytes
        return Work(batch * per_row, weights + (self.cache_bytes(p, batch) if cache_bytes is None else cache_bytes))


def cost_of(config: "LanguageModelConfig", dtype: torch.dtype) -> LmCost:
    from lavida_adapter.families import FAMILIES

    kv = config.n_kv_heads * config.head_dim
    sizes = (config.d_model, kv, config.mlp_hidden_size, config.n_layers, config.vocab_size)
    return LmCost(*sizes, dtype.itemsize, FAMILIES[config.family].language_model.shift)


def suspicion(ms: float, floor_ms: float) -> str:
    """Why a time cannot be right together with its floor; "" for one that can."""
    if ms >= (1 - NOISE) * floor_ms:
        return ""
    return f"{ms:.3g} ms is below the floor of {floor_ms:.3g} ms by more than {NOISE:.0%}, which is noise"


def flags(
    times: Mapping[str, Any], parameter_bytes: float, limits: Limits, floor: Mapping[str, Work]
) -> dict[str, str]:
    """Suspicious figures of a row: a stage faster than the device, or less memory than the weights take.

    `times` is that object of result.json; `floor` is the least work of a stage for one sample. Returns the columns of
    the study's table whose figure is suspicious, and why.
    """
    found = {}
    for stage, work in floor.items():
        taken, least = times["ms_per_sample"].get(stage), limits.floor_ms(work, lenient=True)
        if taken is not None and (why := suspicion(taken, least)):
            found[f"{stage} ms"] = why
    peak = times["peak_memory_mib"]
    if peak is not None and peak * 2**20 < parameter_bytes:
        found["peak memory MiB"] = f"{peak:.0f} MiB is below the {parameter_bytes / 2**20:.0f} MiB of the weights"
    return found


def eval_floor(
    cost: LmCost, n_prefix: np.ndarray, n_steps: np.ndarray, n_answer: int, batch_size: int
) -> dict[str, Work]:
    """The least work of a sample with a prefix cache, on average, from each sample's prompt tokens and steps.

    Weights are read once for a whole batch. A step counts one masked slot: how many there were is not recorded.
    """
    lengths = zip(*(column.tolist() for column in np.unique(n_prefix, return_counts=True)), strict=True)
    prefill = sum((cost.prefill(length).times(count) for length, count in lengths), Work(0, 0))
    denoise = cost.step(0, n_answer, 1).times(int(n_steps.sum()))
    n = len(n_prefix)
    floor = {"prefill": prefill, "denoise": denoise}
    return {stage: Work(work.flops / n, work.bytes / (n * batch_size)) for stage, work in floor.items()}


CPU_MESSAGE = "can't allocate memory"
"""Torch has no exception class for a CPU without free memory."""


class OutOfMemory(RuntimeError):
    """The device has not enough memory; the message says how much was needed and which options help."""


def is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and CPU_MESSAGE in str(error))


@contextmanager
def explain_oom(model: "Lavida", batch_size: int, n_tokens: int) -> Iterator[None]:
    """Turns any of those errors into an OutOfMemory with an estimate for a batch of prompts of `n_tokens`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(sentence(model, batch_size, n_tokens)) from error


def sentence(model: "Lavida", batch_size: int, n_tokens: int) -> str:
    """Roughly what weights, caches and one layer's activations take: enough to see which of them is too large."""
    config, item = model.config.lm, model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = cost_of(config, model.dtype).cache_bytes(n_tokens, batch_size)
    layer = batch_size * n_tokens * (4 * config.d_model + 3 * config.mlp_hidden_size) * item
    has = ""
    if model.device.type == "cuda":
        has = f" of {_gib(torch.cuda.get_device_properties(model.device).total_memory)}"
    return (
        f"out of memory on {model.device.type}: weights take {_gib(weights)}{has}, and a batch of {batch_size} prompts "
        f"of {n_tokens} tokens about {_gib(cache + layer)} more; lower batch_size= or budget="
    )


def release() -> None:
    """Frees the memory of a failed job for the next job of a sweep."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
