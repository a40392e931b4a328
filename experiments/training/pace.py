"""How fast training goes: loss, tokens per second, time left and peak memory while it runs, the rates afterwards."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from experiments import measure
from experiments.progress import Progress
from lavida_adapter.module import Trainable


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
        measure.reset_peak_memory(module.device)
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
        return "  ".join([*parts, f"{measure.peak_mib(module.device) / 1024:.2f} GiB"])

    def now(self, device: torch.device) -> dict[str, float]:
        """The rates so far and the peak of the memory, which no two runs share."""
        return self.rates() | {"peak_mib": measure.peak_mib(device)}

    def rates(self) -> dict[str, float]:
        """Samples and tokens per second of this session; nothing after a single step."""
        if not self.seconds:
            return {}
        rates = {"samples_per_s": self.steps * self.batch_size / self.seconds}
        return rates | ({"tokens_per_s": self.tokens / self.seconds} if self.tokens else {})
