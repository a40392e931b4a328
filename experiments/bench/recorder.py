"""What the parts of the GPU bench share: the model and its inputs, rows that are written at once, turns, clocks."""

import platform
import re
import signal
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiments.atomic_files import write_json
from experiments.profiling import peak_memory_mib, release, reset_peak_memory
from lavida_adapter import Lavida
from lavida_adapter.views import Views

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-attn")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"
PEAK_RESET = Path("/proc/self/clear_refs")
"""Linux: writing 5 starts the count of the process's largest resident memory anew."""

T = TypeVar("T")


class OutOfTime(Exception):
    """The time of this process is used up."""


class Recorder:
    """The JSON file of one process: a head, and rows that are on disk as soon as they are measured."""

    def __init__(self, path: Path, head: Mapping[str, Any], deadline: float) -> None:
        """`deadline`: on the clock of time.monotonic."""
        self.path, self.deadline = path, deadline
        self._head = dict(head)
        self._rows: dict[str, dict[str, Any]] = {}

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, key: str, value: Any) -> None:
        self._head[key] = value
        self._write()

    def put(self, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Writes the row `key`; a later one with the same key replaces it.

        A failure replaces no measurement: it is noted beside what was measured before.
        """
        name = " ".join(map(str, key.values()))
        before = self._rows.get(name, {})
        if "ms" in before and (later := found.get("error") or found.get("skipped")):
            found = {**before, "later_turn": later}
        is_new = name not in self._rows or "error" in found
        self._rows[name] = {**key, **found}
        self._write()
        if is_new:
            shown = found.get("error") or found.get("skipped") or {k: round(v, 3) for k, v in found["ms"].items()}
            print(f"[{self.left_s:4.0f} s left] {name}: {shown}", flush=True)

    def measure(self, key: Mapping[str, Any], call: Callable[[], T]) -> T | None:
        """The result of a call; None where it raised, or where no time is left, which becomes the row `key`."""
        if self.left_s <= 0:
            self.put(key, {"skipped": "no time left"})
            return None
        try:
            with limited(self.left_s):
                return call()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:500]}"
            self.put(key, {"error": short(text), "traceback": short(traceback.format_exc())[-6000:]})
        release()
        return None

    def _write(self) -> None:
        write_json(self.path, {**self._head, "rows": list(self._rows.values())})


@dataclass(frozen=True)
class Bench:
    """What is measured, and where the rows go."""

    model: Lavida
    lm: str
    views: Sequence[Views]
    """At least as many pictures as the largest batch has rows; each turn takes the next ones."""
    question: str
    batches: Sequence[int]
    engines: Sequence[str]
    rounds: int
    n_answer: int
    n_steps: int
    recorder: Recorder

    @property
    def device(self) -> torch.device:
        return self.model.device

    def rounds_at(self, batch: int) -> int:
        """Fewer at a larger batch, whose times vary less and take longer."""
        return self.rounds if batch == 1 else max(1, self.rounds // 3)


def short(text: str) -> str:
    """A text without the folders of this machine: paths relative to the repository, of others the last two names."""
    return re.sub(r"(?<![\w.])/(?:[^/\s\"':,]+/)*([^/\s\"':,]+/[^/\s\"':,]+)", r"\1", text.replace(f"{ROOT}/", ""))


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds; a slow compilation ends there too."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def take_turns(
    recorder: Recorder,
    keys: Mapping[str, Mapping[str, Any]],
    calls: Mapping[str, Callable[[], Mapping[str, float]]],
    rounds: int,
    about: Mapping[str, Mapping[str, Any]],
    warm_up: bool = True,
) -> None:
    """Measures every call `rounds` times, in turn, so that a change of the clock hits all alike; one row for each.

    With `warm_up` a first round is not counted. Rows are written again after each round: `keys` and `about` by the name
    of the call. A call that fails gets a row with its error and has no further turn.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in calls}
    failed: set[str] = set()
    for number in range(0 if warm_up else 1, rounds + 1):
        if number > 1 and recorder.left_s <= 0:
            break
        for name, call in calls.items():
            if name not in failed:
                result = recorder.measure(keys[name], call)
                failed |= {name} if result is None else set()
                found[name] += [result] if number and result is not None else []
        for name, results in found.items():
            if results and name not in failed:
                recorder.put(keys[name], {**medians(results), **about[name]})


def medians(results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians by key, how many there were, and all of them."""
    keys = list(dict.fromkeys(key for result in results for key in result))
    every = {key: [result.get(key, 0.0) for result in results] for key in keys}
    return {"ms": {k: statistics.median(v) for k, v in every.items()}, "n": len(results), "ms_all": every}


def start_peak(device: torch.device) -> None:
    """From here on `peak_since_mib` counts."""
    reset_peak_memory(device)
    if device.type == "cpu" and PEAK_RESET.exists():
        PEAK_RESET.write_text("5")


def peak_since_mib(device: torch.device) -> float | None:
    """Peak memory since `start_peak`: allocated on the GPU, or on Linux resident in the process, weights included."""
    if device.type != "cpu":
        return peak_memory_mib(device)
    if not PEAK_RESET.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return None if found is None else int(found[1]) / 1024


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Milliseconds of one call, the mean of `times` calls in a row; on CUDA between two events."""
    synchronise(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            call()
        return 1000 * (time.perf_counter() - began) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / times


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The device as its driver describes it now, the versions, and the commit."""
    found: dict[str, Any] = {"device": device.type, "python": platform.python_version()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        state = _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader").split(", ")
        found["state"] = dict(zip(QUERY.split(","), state, strict=False))
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["commit"] = commit or _output("git", "rev-parse", "HEAD") or None
    return found


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
