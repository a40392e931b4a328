"""News of jobs that a launcher runs in other processes, printed by the process that waits for them as they come.

A job leaves its last line in its folder. That works across machines that share the folder and nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.schema import CONF
from experiments.study.files import read_json, write_atomic

SAID = ".said"
POLL_S = 0.5
GRACE_S = 45
"""Between two looks at SLURM's queue; longer than submitit takes to notice a job that ended well."""
_listeners: list["Listener"] = []


class Abandoned(Exception):
    """SLURM's queue is empty, and the process still waits for jobs."""


def elsewhere() -> bool:
    """Whether this process is a job that a launcher started."""
    return "SUBMITIT_EXECUTOR" in os.environ


def say(folder: Path, ok: bool, line: str) -> None:
    """Leaves the job's last line where the waiting process looks."""
    write_atomic(folder / SAID, json.dumps({"ok": ok, "line": line}))


class Watch(Callback):
    """Hydra's callback: listens during a sweep whose jobs run elsewhere. Launchers pickle it, so it holds nothing."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
            # Jobs import the code that this process runs, whatever folder they start in and whatever is installed.
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))
            # On a cluster without accounting, submitit warns at every look at its jobs.
            os.environ.setdefault("SUBMITIT_LOG_LEVEL", "ERROR")
            signal.signal(signal.SIGUSR1, _abandon)
            slurm = config.hydra.launcher._target_.endswith(".SlurmLauncher")
            _listeners.append(Listener(Path(config.hydra.sweep.dir).absolute(), slurm=slurm))


class Listener:
    """Prints what the jobs of a study say, from now on until it is stopped."""

    def __init__(self, study: Path, slurm: bool = False) -> None:
        self.study = study
        self._slurm = slurm
        self._began = self._busy = time.time()
        self._empty = False
        self.heard: dict[Path, bool] = {}
        self._seen = {path: path.stat().st_mtime_ns for path in study.glob(f"*/{SAID}")}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._stop.wait(POLL_S):
            self._hear()
            if self._slurm and self._left_alone():
                self._hear()
                # Not an interrupt: a command in a shell's background ignores those.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return
        self._hear()

    def _left_alone(self) -> bool:
        """Whether the queue has long been empty while this process still waits.

        On a cluster without accounting submitit never learns that a job was killed, and waits for ever.
        """
        if time.time() - self._busy < GRACE_S:
            return False
        ids = [path.name for path in self.study.glob(".submitit/[0-9]*") if path.stat().st_mtime >= self._began - 1]
        queue = subprocess.run(["squeue", "-h", "-o", "%i", "-j", ",".join(ids)], capture_output=True, text=True)
        # A job that SLURM has forgotten is an error to squeue; so is SLURM's own absence, which may pass.
        over = not queue.stdout.strip() and (queue.returncode == 0 or "Invalid job id" in queue.stderr)
        first = self._empty
        self._empty, self._busy = over, time.time()
        return bool(ids) and over and first

    def _hear(self) -> None:
        for path in sorted(self.study.glob(f"*/{SAID}")):
            changed = path.stat().st_mtime_ns
            if self._seen.get(path) == changed:
                continue
            self._seen[path] = changed
            said = read_json(path)
            if said is not None:
                self.heard[path.parent] = said["ok"]
                print(said["line"], file=sys.stdout if said["ok"] else sys.stderr, flush=True)


def _abandon(*_: object) -> None:
    raise Abandoned("SLURM's queue is empty, and not every job has spoken")


def stop_all() -> dict[Path, bool]:
    """Ends the listening; the folders of jobs that were heard of, and whether each went well."""
    heard: dict[Path, bool] = {}
    while _listeners:
        listener = _listeners.pop()
        listener.stop()
        heard |= listener.heard
    return heard
