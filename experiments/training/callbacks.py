"""Callbacks of a training: its throughput, its curve in metrics.csv, and what SIGTERM does."""

import csv
import io
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from experiments import profiling
from experiments.atomic_files import write_atomic
from experiments.progress import Progress
from experiments.torch_trace import TorchTrace
from experiments.training.run_logger import RunLogger
from lavida_adapter.lightning_module import Trainable

METRICS = "metrics.csv"
_LAST = "lr"
"""Metrics with this prefix, the learning rates, are recorded as they are at the point; all others as means."""

Point = dict[str, float]


class Throughput(Callback):
    """Samples and tokens per second of this session, and progress on rank 0.

    Tokens are positions that the language model reads, pictures included, in all processes. The first step warms up
    and does not count. Lightning's own Throughput gives a mean over a window, and nothing before the window is full;
    this is the mean over all steps but the first.
    """

    def __init__(self, title: str, every: int, batch_size: int) -> None:
        self.title, self.every, self.batch_size = title, every, batch_size
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self._began: float | None = None
        self._progress: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        profiling.reset_peak_memory(module.device)
        if trainer.is_global_zero:
            self._progress = Progress(self.title, int(trainer.max_steps), "steps", trainer.global_step)
            self._progress.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        else:
            self.steps, self.seconds = self.steps + 1, now - self._began
            if isinstance(module, Trainable) and module.tally is not None:
                self.tokens += trainer.world_size * module.tally.tokens
        if self._progress is not None:
            # Reading the loss synchronises with the device, so not at every step.
            shown = trainer.global_step % self.every == 0
            self._progress.advance(1, self._note(trainer, module) if shown else "")

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.__exit__()
            self._progress = None

    def _note(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        rates = self.rates()
        parts = [f"loss {float(trainer.callback_metrics['loss']):.4f}"]
        if "tokens_per_s" in rates:
            parts.append(f"{rates['tokens_per_s']:,.0f} tokens/s")
        return "  ".join([*parts, f"{profiling.peak_mib(module.device) / 1024:.2f} GiB"])

    def now(self, device: torch.device) -> dict[str, float]:
        """The rates so far and the peak memory in MiB: the values that differ between two runs of one job."""
        return self.rates() | {"peak_mib": profiling.peak_mib(device)}

    def rates(self) -> dict[str, float]:
        """Samples and tokens per second; empty before the second step has ended."""
        if not self.seconds:
            return {}
        rates = {"samples_per_s": self.steps * self.batch_size / self.seconds}
        return rates | ({"tokens_per_s": self.tokens / self.seconds} if self.tokens else {})


class TraceSteps(Callback):
    """Tells a trace where training steps end."""

    def __init__(self, trace: TorchTrace) -> None:
        self.trace = trace

    def on_train_batch_end(self, *_: Any) -> None:
        self.trace.step()


class History(Callback):
    """Records the training curve: a point every `every` steps and after the last one.

    A point holds the mean of each metric since the point before, and the current learning rates. The run logger gets
    every point, with the throughput and the memory of this session.

    The points, and the sums of the next one, are part of the checkpoint: a resumed run writes the metrics.csv of an
    undisturbed one, byte for byte. Lightning's CSVLogger logs single steps instead of means, and when a run is resumed
    it deletes the file or adds steps a second time; so this callback writes the file.
    """

    def __init__(self, path: Path, every: int, run_logger: RunLogger | None, throughput: Throughput) -> None:
        self.path, self.every, self.run_logger, self.throughput = path, every, run_logger, throughput
        self.points: list[Point] = []
        self.loss: Tensor | None = None
        """The loss of the last step."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def on_train_start(self, *_: Any) -> None:
        if self.run_logger is not None:
            self.run_logger.replay_history(self.points)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            # Sums stay on the device: reading them at every step would synchronise with it.
            last = name.startswith(_LAST)
            before = 0 if last else self._sums.get(name, 0)
            self._sums[name] = before + value.detach().double()
            self._counts[name] = 1 if last else self._counts[name] + 1
        self.loss = trainer.callback_metrics.get("loss")
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self.points.append({"step": step} | {n: float(s) / self._counts[n] for n, s in self._sums.items()})
            self._sums.clear()
            self._counts.clear()
            if trainer.is_global_zero:
                write_atomic(self.path, _csv(self.points))
            if self.run_logger is not None:
                self.run_logger.log_metrics(self.points[-1] | self.throughput.now(module.device))

    def state_dict(self) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self._sums.items()}
        loss = None if self.loss is None else self.loss.item()
        return {"points": list(self.points), "sums": sums, "counts": dict(self._counts), "loss": loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = list(state_dict["points"])
        self._sums = {n: torch.tensor(s, dtype=torch.float64) for n, s in state_dict["sums"].items()}
        self._counts = defaultdict(int, state_dict["counts"])
        if (loss := state_dict.get("loss")) is not None:  # checkpoints did not always have it
            self.loss = torch.tensor(loss)


def last_loss(trainer: L.Trainer) -> float:
    """The loss of the last step; also of a training that was complete when it was killed, and has no step left."""
    (history,) = (callback for callback in trainer.callbacks if isinstance(callback, History))  # type: ignore[attr-defined]
    assert history.loss is not None
    return history.loss.item()


def read_points(path: Path) -> list[Point]:
    """The points of a metrics.csv; a point has no entry for an empty cell."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _csv(points: list[Point]) -> str:
    names = list(dict.fromkeys(name for point in points for name in point))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({n: int(v) if n == "step" else repr(v) for n, v in point.items()} for point in points)
    return out.getvalue()


class SigtermHandler(Callback):
    """Keeps the SIGTERM handler that the process had, which is the command's, a launcher's or a run logger's.

    Lightning's own sends messages to the other ranks in the middle of a step.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.handler)
