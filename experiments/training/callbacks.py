"""The curves of a run: what was logged, averaged between points, in metrics.csv."""

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from experiments.atomic_files import write_atomic
from shirg import UserError

if TYPE_CHECKING:
    from experiments.training.run_logger import RunLogger

    pass
import time

from experiments import profiling
from experiments.progress import Progress
from lavida_adapter.lightning_module import Trainable

METRICS = "metrics.csv"
_LAST = "lr"
"""Learning rates are shown as they are at the point; everything else is the mean since the point before."""

Point = dict[str, float]


class History(Callback):
    """Writes a point every so many steps, and after the last one.

    The points are part of the checkpoint, so that the curve of a resumed run is that of an undisturbed one. A mirror
    gets each of them, with the pace and the memory of this session.
    """

    def __init__(self, path: Path, every: int, mirror: "RunLogger | None", pace: "Throughput") -> None:
        if every < 1:
            raise UserError(f"trainer.log_every={every}: give at least 1")
        self.path, self.every, self.mirror, self.pace = path, every, mirror, pace
        self.points: list[Point] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def on_train_start(self, *_: Any) -> None:
        if self.mirror is not None:
            self.mirror.catch_up(self.points)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            # Sums stay on the device: reading them at every step would make it wait.
            last = name.startswith(_LAST)
            before = 0 if last else self._sums.get(name, 0)
            self._sums[name] = before + value.detach().double()
            self._counts[name] = 1 if last else self._counts[name] + 1
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self.points.append({"step": step} | {n: float(s) / self._counts[n] for n, s in self._sums.items()})
            self._sums.clear()
            self._counts.clear()
            if trainer.is_global_zero:
                write_atomic(self.path, _csv(self.points))
            if self.mirror is not None:
                self.mirror.point(self.points[-1] | self.pace.now(module.device))

    def state_dict(self) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"points": list(self.points), "sums": sums, "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = list(state_dict["points"])
        self._sums = {n: torch.tensor(s, dtype=torch.float64) for n, s in state_dict["sums"].items()}
        self._counts = defaultdict(int, state_dict["counts"])


def read_points(path: Path) -> list[Point]:
    """The points of a metrics.csv; a name that a point lacks is left out of it."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _csv(points: list[Point]) -> str:
    names = list(dict.fromkeys(name for point in points for name in point))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({n: int(v) if n == "step" else repr(v) for n, v in point.items()} for point in points)
    return out.getvalue()


class Throughput(Callback):
    """Shows progress on the first process, and keeps the rates of this session.

    Tokens are positions that the language model reads, pictures included, on all processes. The first step warms up
    and does not count.
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
            # Reading the loss waits for the device, so not at every step.
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
        """The rates so far and the peak of the memory, which no two runs share."""
        return self.rates() | {"peak_mib": profiling.peak_mib(device)}

    def rates(self) -> dict[str, float]:
        """Samples and tokens per second of this session; nothing after a single step."""
        if not self.seconds:
            return {}
        rates = {"samples_per_s": self.steps * self.batch_size / self.seconds}
        return rates | ({"tokens_per_s": self.tokens / self.seconds} if self.tokens else {})
