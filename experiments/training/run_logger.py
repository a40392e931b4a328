"""Copies of a job for a Lightning logger: the curve of a training, numbers at the end, samples and overlays for wandb.

The job's own files are the record. A logger that fails is named on standard error and takes no result with it.
"""

import io
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from omegaconf import DictConfig
from PIL import Image

from experiments import build
from experiments.atomic_files import write_atomic
from experiments.jobs.job import Job
from experiments.jobs.results import SHOTS
from experiments.viz.examples import load_examples
from shirg import UserError

RUN_ID = "wandb-id"
"""File in a job's folder: the id of its run, which the job keeps when it is resumed."""
_SECTIONS = ("training", "quality", "tokens", "times")


class Terminated(BaseException):
    """SIGTERM, for as long as it takes to close the run."""


class RunLogger:
    """What a job sends to its logger; without a logger, and in processes other than the first, nothing.

    A context: a wandb run is closed at its end, so that the next job of a sweep gets its own. Whatever ends the job
    early, Ctrl+C and SIGTERM among it, marks the run as failed.
    """

    def __init__(self, logger: Any, job: Job) -> None:
        self.logger, self.job = logger, job
        self._in_wandb = type(logger).__name__ == "WandbLogger"
        self.sigterm: Callable[[int, FrameType | None], Any] | signal.Handlers = signal.SIG_DFL
        """What SIGTERM does meanwhile."""

    @classmethod
    def of(cls, cfg: DictConfig, job: Job) -> Self:
        """The mirror of `logger=...`.

        Raises:
            UserError: wandb is to be online and has no key.
        """
        if not job.ranks.is_main:
            return cls(None, job)
        if not shows_pictures(cfg):
            return cls(build.build_logger(cfg), job)
        if not cfg.logger.get("offline"):
            import wandb

            if not wandb.login(prompt=False, verify=False):
                raise UserError(
                    "logger.offline=false: there is no key for Weights & Biases; run `wandb login`, set WANDB_API_KEY, "
                    "or leave logger.offline=true"
                )
        return cls(build.build_logger(cfg, {"id": _run_id(job.folder, cfg.resume)}), job)

    def __enter__(self) -> Self:
        if self._in_wandb:
            self.sigterm = _terminate
            self._before = signal.signal(signal.SIGTERM, self.sigterm)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._in_wandb:
            signal.signal(signal.SIGTERM, self._before)
        self._close(failed=kind is not None)
        if kind is Terminated:
            # The process ends as it would have without a logger.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(self) -> None:
        """Opens the run and says what the job is."""
        identity = self.job.identity
        about = {"command": identity.command, "choices": identity.choices}
        self._send(lambda: self.logger.log_hyperparams(identity.config | about))

    def catch_up(self, points: Sequence[Mapping[str, float]]) -> None:
        """Sends the points of a resumed curve again, unless they are there: a run that is offline starts empty."""

        def send() -> None:
            if not (self._in_wandb and self.logger.experiment.resumed):
                for point in points:
                    self._log(point)

        self._send(send)

    def point(self, point: Mapping[str, float]) -> None:
        """Sends one point of a curve, at its "step"."""
        self._send(lambda: self._log(point))

    def end(self, sections: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the job's numbers, and to wandb what it answered and the overlays in its folder."""
        self._send(lambda: self.logger.log_metrics(numbers(sections)))
        if self._in_wandb and rows:
            columns = ["id", "question", "answers", "prediction", "n_visual", "recall"]
            table = [[_cell(row[c]) for c in columns] for row in rows]
            self._send(lambda: self.logger.log_text("samples", columns=columns, data=table))
        if self._in_wandb and (shots := load_examples(self.job.folder / SHOTS)):
            pictures = [Image.open(io.BytesIO(shot.overlay)) for shot in shots]
            captions = [f"{shot.record['question']} -> {shot.record['prediction']}" for shot in shots]
            self._send(lambda: self.logger.log_image("kept tokens", pictures, caption=captions))

    def _log(self, point: Mapping[str, float]) -> None:
        self.logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
        self.logger.save()

    def _send(self, send: Callable[[], Any]) -> None:
        if self.logger is None:
            return
        try:
            send()
        except Exception as error:  # whatever a remote service can raise
            self._warn(error)
            self._close(failed=True)

    def _close(self, failed: bool) -> None:
        logger, self.logger = self.logger, None
        if logger is None:
            return
        try:
            logger.finalize("failed" if failed else "success")
            if self._in_wandb:
                import wandb

                wandb.finish(exit_code=int(failed))
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        print(f"warning: the logger failed ({error}); {self.job.folder} has everything", file=sys.stderr)


def shows_pictures(cfg: DictConfig) -> bool:
    """Whether the logger of a config is wandb, which all processes of a job can tell."""
    return str(cfg.logger.get("_target_", "")).endswith(".WandbLogger")


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait
    raise Terminated


def _run_id(folder: Path, resume: bool) -> str:
    path = folder / RUN_ID
    if not (resume and path.exists()):
        write_atomic(path, secrets.token_hex(4))
    return path.read_text()


def numbers(sections: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of the sections that hold results, by dotted name."""
    found: dict[str, float] = {}
    for key, value in sections.items():
        if not prefix and key not in _SECTIONS:
            continue
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def _cell(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value
