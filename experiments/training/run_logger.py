"""Sends a job to a Lightning logger: training curve, results, overlays, and for wandb samples.

The job's own files are the record. A logger that fails prints a warning; the job goes on.
"""

import io
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from experiments import build
from experiments.atomic_files import write_atomic
from experiments.errors import Terminated, raise_terminated
from experiments.jobs.job import Job
from experiments.jobs.results import SHOTS
from experiments.viz.examples import load_examples
from shirg import UserError

RUN_ID = "wandb-id"
"""File in a job's folder with the id of its wandb run. A resumed job continues that run."""
LOGGED = ("id", "question", "answers", "prediction", "n_visual", "recall")
"""Columns of a sample that wandb gets."""
MOST_LOGGED = 10_000
"""Samples that wandb gets, which has no use for more in a table."""
_SECTIONS = ("training", "quality", "tokens", "times")
_SHORT = {
    "quality.": "",
    "quality.metrics.": "",
    "quality.subsets.": "",
    "quality.groups.": "group ",
    "quality.subtasks.": "subtask ",
    "quality.recall_subsets.": "recall ",
    "tokens.": "tokens ",
    "tokens.by_source.": "tokens ",
    "times.": "",
    "times.ms_per_sample.": "ms ",
    "training.": "training ",
    "training.gate.": "gate ",
}
"""What the beginning of a dotted name becomes."""
SIDE = 512
_SHOW_IMAGES = ("WandbLogger", "TensorBoardLogger")


class RunLogger:
    """The logger of one job. It does nothing without a logger, and in processes other than rank 0.

    Use it as a context manager: at its end the wandb run is closed, so that the next job of a sweep gets its own. The
    run is marked as failed when anything ends the job early, Ctrl+C and SIGTERM included.

    `Trainer(logger=)` would not do: it logs single steps and not the points of metrics.csv, a logger that fails would
    end the training, and Lightning's WandbLogger gives wandb no exit code.
    """

    def __init__(self, logger: Any, job: Job) -> None:
        self.logger, self.job = logger, job
        self._in_wandb = type(logger).__name__ == "WandbLogger"

    @classmethod
    def of(cls, cfg: DictConfig, job: Job) -> Self:
        """The logger of `logger=...` for this job.

        Raises:
            UserError: wandb is online and has no key.
        """
        if not job.ranks.is_main:
            return cls(None, job)
        if not _is(cfg, "WandbLogger"):
            return cls(build.build_logger(cfg), job)
        os.environ.setdefault("WANDB_SILENT", "true")  # it prints 40 lines a job
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
            self._before = signal.signal(signal.SIGTERM, raise_terminated)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._in_wandb:
            signal.signal(signal.SIGTERM, self._before)
        self._close(failed=kind is not None)
        if kind is Terminated and self._in_wandb and self._before is signal.SIG_DFL:
            # One of several processes ends as it would have without a logger.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(self) -> None:
        """Opens the run and logs the job's config."""
        identity = self.job.identity
        about = {"command": identity.command, "choices": identity.choices}
        self._send(lambda: self.logger.log_hyperparams(identity.config | about))
        if self._in_wandb:
            self._send(self._say_where)

    def _say_where(self) -> None:
        """The one line about wandb, which is told to be silent."""
        run = self.logger.experiment
        print(f"wandb {run.url or f'offline: wandb sync {Path(run.dir).parent}'}", flush=True)

    def replay_history(self, points: Sequence[Mapping[str, float]]) -> None:
        """Logs the points of a resumed training again, unless the run has them: an offline run starts empty."""

        def send() -> None:
            if not (self._in_wandb and self.logger.experiment.resumed):
                for point in points:
                    self._log(point)

        self._send(send)

    def log_metrics(self, point: Mapping[str, float]) -> None:
        """Logs one point of a curve, at its "step"."""
        self._send(lambda: self._log(point))

    def end(self, sections: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        """Logs the numbers of result.json, the overlays in the job's folder, and to wandb the first samples."""
        self._send(lambda: self._log_numbers(flat_numbers(sections)))
        table = [[_cell(row[c]) for c in LOGGED] for row in islice(rows, MOST_LOGGED)] if self._in_wandb else []
        if table:
            self._send(lambda: self.logger.log_text("samples", columns=list(LOGGED), data=table))
        self._send(self._log_overlays)

    def _log_numbers(self, found: Mapping[str, float]) -> None:
        """A number is no curve: wandb has a summary for it."""
        if self._in_wandb:
            self.logger.experiment.summary.update(found)
        else:
            self.logger.log_metrics(found)

    def _log_overlays(self) -> None:
        kind = type(self.logger).__name__
        shots = load_examples(self.job.folder / SHOTS) if kind in _SHOW_IMAGES else []
        pictures = [_scaled(Image.open(io.BytesIO(shot.overlay)).convert("RGB")) for shot in shots]
        captions = [f"{shot.record['question']} -> {shot.record['prediction']}" for shot in shots]
        if kind == "WandbLogger" and shots:
            self.logger.log_image("kept tokens", pictures, caption=captions)
        elif shots:
            for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                self.logger.experiment.add_image(
                    f"kept tokens/{number}: {caption}", np.asarray(picture), dataformats="HWC"
                )
            self.logger.save()

    def _log(self, point: Mapping[str, float]) -> None:
        self.logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
        self.logger.save()

    def _send(self, send: Callable[[], Any]) -> None:
        if self.logger is None:
            return
        try:
            send()
        except Exception as error:  # a remote service can raise anything
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


def logs_images(cfg: DictConfig) -> bool:
    """Whether the logger of a config shows overlays. This is the same in all processes of a job."""
    return any(_is(cfg, kind) for kind in _SHOW_IMAGES)


def _is(cfg: DictConfig, kind: str) -> bool:
    return str(cfg.logger.get("_target_", "")).endswith(f".{kind}")


def _run_id(folder: Path, resume: bool) -> str:
    path = folder / RUN_ID
    if not (resume and path.exists()):
        write_atomic(path, secrets.token_hex(4))
    return path.read_text()


def flat_numbers(sections: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of the sections of result.json that hold results, by a short name: `exact_match`, `exact_match low`,
    `fine sparse`, `ms total`, `training loss`."""
    return {flat_name(name): value for name, value in numbers(sections)}


def flat_name(dotted: str) -> str:
    """The name under which a number of result.json, such as `quality.subsets.fine sparse.mean`, is logged."""
    start = max((start for start in _SHORT if dotted.startswith(start)), key=len)
    return f"{_SHORT[start]}{dotted.removeprefix(start)}".removesuffix(".mean").replace(".", " ")


def numbers(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of each."""
    for key, value in sections.items():
        if not prefix and key not in _SECTIONS:
            continue
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def _scaled(picture: Image.Image) -> Image.Image:
    """The overlay with a longer side of SIDE pixels, as large as wandb and TensorBoard show it."""
    width, height = (round(edge * SIDE / max(picture.size)) for edge in picture.size)
    return picture.resize((max(1, width), max(1, height)), Image.Resampling.LANCZOS)


def _cell(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value
