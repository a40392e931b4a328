"""Inputs that should be refused, each as a command of its own: how it ends, in how many seconds, in how much memory.

An input is fine when its command ends with exit code 1 and one line that begins with "error: ", or runs as it should,
within the limits. Seconds are limited beyond those of a plain run of the same command, measured just before the inputs
of its kind, because a busy machine is slow for both. Every command runs in a child that is forked from a process with
everything imported, so that seconds and memory are the input's own.
"""

import gc
import importlib
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bench.common import BenchResult, Columns, table_of
from experiments.bench.hostile_inputs import HostileInput, inputs
from experiments.schema import CONF
from shirg import UserError

MOST_S, MOST_MIB = 10.0, 1024.0
"""Seconds beyond a plain run, and MiB."""
GIVE_UP_S = 60
WORDS = {"eval": ("limit=2", "shots=1"), "train": ("optim.steps=2", "batch_size=2", "optim.warmup=0")}
IMPORTED = ("datasets", "transformers", "lightning", "peft", "pandas", "matplotlib.pyplot", "experiments.cli")
COLUMNS: Columns = {
    "kind": ("kind", "s"),
    "inputs": ("inputs", "d"),
    "refused": ("refused", "d"),
    "ran": ("ran", "d"),
    "faults": ("faults", "d"),
    "slowest s": ("slowest_s", ".1f"),
    "plain s": ("plain_s", ".1f"),
    "most MiB": ("largest_mib", ".0f"),
}


def run(*, device: torch.device, only: Sequence[str] | None) -> BenchResult:
    given = inputs()
    kinds = list(dict.fromkeys(one.kind for one in given))
    if unknown := sorted(set(only or ()) - set(kinds)):
        raise UserError(f"--only {unknown[0]}: choose from {', '.join(kinds)}")
    for module in (*IMPORTED, "experiments.evaluate", "experiments.train", "experiments.report.publish"):
        importlib.import_module(module)
    torch.set_num_threads(1)  # no thread pool exists when children are forked
    gc.collect()
    gc.freeze()
    ended = []
    for kind in only or kinds:
        alike = [one for one in given if one.kind == kind]
        plain_s = {command: _plain_s(command, device) for command in dict.fromkeys(one.command for one in alike)}
        ended += [outcome(one, device, plain_s[one.command]) for one in alike]
    rows = [_row(kind, part) for kind in kinds if (part := [one for one in ended if one["kind"] == kind])]
    total = _row("all", ended)
    faults = [one for one in ended if one["end"] == "fault"]
    report: dict[str, Any] = {
        "limits": {"s_beyond_plain": MOST_S, "mib": MOST_MIB},
        "rows": rows,
        "total": total,
        "inputs": ended,
    }
    notes = (
        f"{len(ended)} inputs: {total['refused']} refused in one sentence, {total['ran']} ran, {len(faults)} faults",
        *(f"fault: {one['kind']}, {one['name']}: {one['last'][:150]}" for one in faults),
    )
    return BenchResult("hostile inputs", report, table_of([*rows, total], COLUMNS), notes)


def _plain_s(command: str, device: torch.device) -> float:
    """Seconds of a command on the shipped model and data, as the inputs run it."""
    ended = outcome(HostileInput("plain", command, command=command), device, GIVE_UP_S)
    if ended["end"] != "ran":
        raise RuntimeError(f"a plain run of {command} failed: {ended['last']}")
    return float(ended["s"])


def outcome(one: HostileInput, device: torch.device, plain_s: float) -> dict[str, Any]:
    """Runs one input: how it ended ("refused", "ran" or "fault"), seconds, MiB that it took, its last line.

    `plain_s`: seconds that the same command takes without the input.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        named = one.write(data) if one.write is not None else []
        words = [*WORDS[one.command], "threads=1", f"device={device}", *named]
        keys = {word.partition("=")[0] for word in one.words}
        words = [word for word in words if word.partition("=")[0] not in keys]
        code, lines, seconds, mib = _forked(one.command, [*words, *one.words], Path(folder))
    sentence = code == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    end = "refused" if sentence else "ran" if code == 0 and not lines else "fault"
    if seconds > plain_s + MOST_S or mib > MOST_MIB:
        end = "fault"
    last = lines[-1].replace(folder, "DIR").replace(str(CONF.parent), ".")[:300] if lines else ""
    used = {"s": seconds, "plain_s": plain_s, "mib": mib}
    return {"kind": one.kind, "name": one.name, "end": end, "code": code, **used, "last": last}


def _forked(command: str, words: Sequence[str], cwd: Path) -> tuple[int, list[str], float, float]:
    """Exit code, lines of standard error, seconds, and MiB at the peak above those at the beginning."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as held:
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            os.write(held.fileno(), Path("/proc/self/statm").read_bytes().split()[1])
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _be_command(command, words, cwd)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - began
        err.seek(0)
        lines = err.read().decode(errors="replace").strip().splitlines()
        held.seek(0)
        base_mib = int(held.read()) * resource.getpagesize() / 2**20
    return os.waitstatus_to_exitcode(status), lines, seconds, usage.ru_maxrss / 2**10 - base_mib


def _be_command(command: str, words: Sequence[str], cwd: Path) -> None:
    """Becomes `python COMMAND.py WORDS` in the child, which ends here."""
    code: Any = 70
    try:
        signal.alarm(GIVE_UP_S)
        os.chdir(cwd)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        sys.argv = [str(CONF.parent / f"{command}.py"), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _row(kind: str, ended: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = {name: sum(one["end"] == end for one in ended) for name, end in _ENDS.items()}
    most = {key: max(one[key] for one in ended) for key in ("s", "plain_s", "mib")}
    most = {"slowest_s": most["s"], "plain_s": most["plain_s"], "largest_mib": most["mib"]}
    return {"kind": kind, "inputs": len(ended), **counts, **most}


_ENDS = {"refused": "refused", "ran": "ran", "faults": "fault"}
