"""What a training in another process has reached, and the file of an offline wandb run."""

import json
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from experiments.training.callbacks import read_points
from experiments.training.trainer import SafeCheckpoints

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 2**15
"""Bytes of a block in wandb's file."""


def wait_for_step(process: subprocess.Popen[str], root: Path, step: int) -> None:
    """Until the curve of the run under `root` has reached a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list(root.glob("outputs/s/*/metrics.csv"))
        if found and read_points(found[0])[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never reached: {process.poll()}")


def last_step(folder: Path) -> int:
    return int(SafeCheckpoints().load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"])


@dataclass(frozen=True)
class Run:
    """What lies in the file of an offline run."""

    records: "list[Record]"

    def one(self, kind: str) -> Any:
        return next(getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind)

    @property
    def exit_code(self) -> int:
        return int(self.one("exit").exit_code)

    @property
    def config(self) -> dict[str, Any]:
        return {u.key: json.loads(u.value_json) for r in self.records for u in r.config.update}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was logged together, nested keys joined by dots."""
        found = [r.history.item for r in self.records if r.WhichOneof("record_type") == "history"]
        return [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items} for items in found]

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary as it was set, without what follows from its curves."""
        updates = [u for r in self.records if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
        return {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in updates}

    def history(self, name: str) -> list[tuple[int, float]]:
        """Step and value of a metric."""
        return [(row["trainer/global_step"], row[name]) for row in self.rows if name in row]


def read_run(path: Path) -> Run:
    """Reads wandb's file: records of its own protocol in blocks of LevelDB's log format, after a head of 7 bytes."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record

    def pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
        at = 7
        while at < len(data):
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            yield kind, data[at + 7 : at + 7 + size]
            at += 7 + size

    records, whole = [], b""
    for kind, piece in pieces(path.read_bytes()):
        whole = piece if kind in (1, 2) else whole + piece  # whole or first, then middle or last
        if kind in (1, 4):
            records.append(record.FromString(whole))
    return Run(records)


def runs_of(folder: Path) -> list[Run]:
    """The runs of a job, the oldest first."""
    return [read_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getctime)]
