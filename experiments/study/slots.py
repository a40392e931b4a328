"""Turns for jobs that a launcher starts all at once on one machine: one job on each GPU, or on each share of the cores.

Locks are files, so that two sweeps on one machine take turns as well. Nothing here imports torch: jobs that wait cost
a few megabytes each.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

SLOT_POLL_S = 0.2
GPUS_VARIABLE = "SHIRG_GPUS"
"""Where a job finds the GPUs of the process that started it: submitit hides them from the jobs of this machine."""


@contextmanager
def acquire_slot(threads: int | None, device: str) -> Iterator[str | None]:
    """Waits for a free slot and holds it; a GPU's slot makes it the only one that the job sees.

    Jobs that do not come from the launcher `local` have the machine's other users to ask, not us: they go on at once.

    Args:
        threads: CPU threads of the job; None is all cores.
        device: the config's: auto, cpu, or a CUDA device.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "local":
        yield None
        return
    gpus = [] if device == "cpu" else _names(os.environ.get(GPUS_VARIABLE, ""))
    cores = len(os.sched_getaffinity(0))
    names = [f"gpu-{gpu}" for gpu in gpus] or [f"cpu-{i}" for i in range(max(1, cores // (threads or cores)))]
    with _first_free(names) as name:
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[names.index(name)]
        yield name


def export_gpus() -> None:
    """Tells the jobs that this process is about to start which GPUs they may take turns on."""
    os.environ[GPUS_VARIABLE] = ",".join(visible_gpus())


def visible_gpus() -> list[str]:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return _names(told)
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    return [str(i) for i in range(len(listed.stdout.splitlines()))] if listed.returncode == 0 else []


def _names(devices: str) -> list[str]:
    return [name.strip() for name in devices.split(",") if name.strip() not in ("", "-1")]


@contextmanager
def _first_free(names: list[str]) -> Iterator[str]:
    folder = Path(tempfile.gettempdir()) / f"shirg-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locks = {name: FileLock(folder / f"{name}.lock") for name in names}
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield name
            finally:
                lock.release()
            return
        time.sleep(SLOT_POLL_S)
