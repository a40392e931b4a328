"""Whether processes of one machine share the weights of a model: seconds to load, and memory of each process.

Two processes load the same checkpoint, one after the other, as jobs of an array on one node do. Tensors that keep the
stored dtype are mapped from the file, so one copy in the page cache serves all processes. Tensors that are converted,
or moved to a GPU, are a copy of each process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import build
from experiments.bench.common import BenchResult, Columns, sizes_of, table_of, title_of

STORED = "bfloat16"
SIZES = ("d_model=1536", "n_heads=12", "n_kv_heads=12", "n_layers=16", "mlp_hidden_size=4096", "vocab_size=65536")
"""Half a billion parameters: 1 GiB as bfloat16."""
COLUMNS: Columns = {
    "loaded as": ("dtype", "s"),
    "process": ("process", "d"),
    "load s": ("seconds", ".2f"),
    "of the file, MiB": ("file_mib", ",.0f"),
    "of its own, MiB": ("own_mib", ",.0f"),
}
_FIELDS = {"file_mib": "Pss_File", "own_mib": "Pss_Anon"}
"""Proportional set sizes: a page that two processes have in memory counts half for each."""


def run(*, device: torch.device, model: str, processes: int, dtypes: Sequence[str]) -> BenchResult:
    """Saves random weights at the sizes above, then loads them in each dtype."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        words = [f"model={model}", f"dtype={STORED}", *(f"model.config.lm.{size}" for size in SIZES)]
        made = build.build_model(build.compose_eval(*words), torch.device("cpu"))
        made.save_pretrained(folder)
        sizes = sizes_of(made, parameters=sum(p.numel() for p in made.parameters()))
        del made
        rows = [row for name in dtypes for row in load_together(Path(folder), name, device, processes)]
    notes = ("PSS: a page that several processes have in memory counts in equal parts for each.",)
    return BenchResult(title_of(model, sizes), {"sizes": sizes, "rows": rows}, table_of(rows, COLUMNS), notes)


def load_together(folder: Path, dtype: str, device: torch.device, processes: int) -> list[dict[str, Any]]:
    """Loads the checkpoint in one process after the other; memory is read while all of them hold it.

    The first one finds nothing in the page cache.
    """
    forget(folder)
    program = (
        "import sys, time\n"
        "import torch\n"
        "from lavida_adapter import Lavida\n"
        "print(flush=True)\n"
        "sys.stdin.readline()\n"
        "began = time.perf_counter()\n"
        f"model = Lavida.from_pretrained({str(folder)!r}, dtype={dtype!r}, device={str(device)!r})\n"
        "print(time.perf_counter() - began, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    rows: list[dict[str, Any]] = []
    running = []
    try:
        for number in range(1, processes + 1):
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            running.append(process)
            _answer(process)
            before = memory_of(process.pid)
            seconds = float(_answer(process, "load"))
            rows.append({"dtype": dtype, "process": number, "seconds": seconds, "before": before})
        for row, process in zip(rows, running, strict=True):
            before = row.pop("before")
            row |= {name: mib - before[name] for name, mib in memory_of(process.pid).items()}
    finally:
        for process in running:
            process.kill()
            process.wait()
    return rows


def _answer(process: "subprocess.Popen[str]", word: str | None = None) -> str:
    """The next line of a process, after a line to it."""
    assert process.stdin is not None and process.stdout is not None
    if word is not None:
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process ended before it had loaded the model")
    return line


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    time.sleep(0.1)


def memory_of(process: int) -> dict[str, float]:
    """MiB of a process by kind."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name.rstrip(":"): int(size) for name, size, _ in map(str.split, lines)}
    return {name: kib[field] / 1024 for name, field in _FIELDS.items()}
