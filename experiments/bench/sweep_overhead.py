"""What a job of a sweep costs beside its answers: `eval.py -m` over many selectors on few samples, as users start it.

The overhead of a job is the time from the end of the job before it, less the time in which its samples were encoded and
answered. The first job is not counted: it waits for imports and for the model. On a machine that others use, too, the
CPU time is the one to compare; it includes the answers.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from experiments.bench.common import BenchResult, Columns, table_of
from experiments.jobs.results import SAMPLES
from experiments.schema import CONF
from shirg import UserError

STUDY = "overhead"
COLUMNS: Columns = {
    "job": ("job", "s"),
    "wall s": ("wall_s", ".3f"),
    "CPU s": ("cpu_s", ".3f"),
    "answers s": ("answers_s", ".3f"),
    "overhead s": ("overhead_s", ".3f"),
}


@dataclass(frozen=True)
class Clock:
    """Wall-clock time, and CPU time of the sweep's process."""

    wall_s: float
    cpu_s: float

    @classmethod
    def of(cls, pid: int) -> "Clock":
        """Reads Linux's /proc: the time of a process that has not ended is nowhere else."""
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return cls(time.perf_counter(), (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))


def run(*, device: torch.device, model: str, selectors: int, samples: int) -> BenchResult:
    known = sorted(path.stem for path in (CONF / "selector").glob("*.yaml"))
    if not 2 <= selectors <= len(known):
        raise UserError(f"--selectors {selectors}: give 2 to {len(known)}")
    words = ["-m", f"selector={','.join(known[:selectors])}", f"model={model}", f"limit={samples}", "threads=1"]
    words += [f"device={device}", f"study={STUDY}"]
    with tempfile.TemporaryDirectory() as folder:
        loads, ends = sweep(words, Path(folder))
        rows = [row_of(before, after) for before, after in zip(ends, ends[1:], strict=False)]
    seconds = {name: summary_of([row[name] for row in rows]) for name in ("overhead_s", "cpu_s")}
    report = {"sweep": ["eval.py", *words], "jobs": len(ends), "models_read": loads, **seconds, "rows": rows}
    report |= {"processes_waiting": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0))}
    notes = (
        f"overhead of a job: median {seconds['overhead_s']['median']:.3f} s; CPU time with answers: median "
        f"{seconds['cpu_s']['median']:.3f} s; {report['processes_waiting']:.1f} processes on {report['cores']} cores",
        f"models read: {loads} for {len(ends)} jobs",
    )
    return BenchResult(f"{model}: {selectors} selectors, {samples} samples", report, table_of(rows, COLUMNS), notes)


def summary_of(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "mean": statistics.fmean(values), "max": max(values)}


@dataclass(frozen=True)
class JobEnd:
    """A job that has ended."""

    folder: Path
    at: Clock


def sweep(words: list[str], cwd: Path) -> tuple[int, list[JobEnd]]:
    """Runs the sweep in `cwd`: how many models it read, and the end of each job.

    Raises:
        UserError: a job failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", str(CONF.parent / "eval.py"), *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CONF.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    loads, ends = 0, []
    with process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            loads += line.startswith("model ")
            if line.startswith("ok "):
                name = line.split(maxsplit=1)[1].rpartition(":")[0]
                ends.append(JobEnd(cwd / "outputs" / STUDY / name, Clock.of(process.pid)))
        said = process.stderr.read().strip().splitlines()
    if process.returncode:
        raise UserError(f"the sweep ended with {process.returncode}: {said[-1] if said else 'it says nothing'}")
    return loads, ends


def row_of(before: JobEnd, job: JobEnd) -> dict[str, Any]:
    """A job's seconds, from the end of the job before it."""
    table = pq.read_table(job.folder / SAMPLES)
    answers_ms = sum(sum(table[name].to_pylist()) for name in table.column_names if name.startswith("ms_"))
    wall_s, cpu_s = job.at.wall_s - before.at.wall_s, job.at.cpu_s - before.at.cpu_s
    return {
        "job": job.folder.name,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "answers_s": answers_ms / 1000,
        "overhead_s": wall_s - answers_ms / 1000,
    }
