"""What a training shows while it runs: steps, time left, loss, tokens per second, memory."""

import re
import sys
from typing import Any

import lightning as L
import pytest

from experiments import profiling, progress
from experiments.training.callbacks import Throughput
from tests.lavida_adapter.training_runs import fit, stage

NOTE = r"loss (\d\.\d{4})  ([\d,]+) tokens/s  (\d+\.\d\d) GiB"


class _Tokens(L.Callback):
    def __init__(self) -> None:
        self.of_steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.of_steps.append(module.tally.tokens)


def test_lines_of_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY_S", -1.0)  # a line at every step
    throughput, tokens, module = Throughput("job", 2, batch_size=2), _Tokens(), stage()
    losses = fit(module, 4, callbacks=[throughput, tokens])
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if "job: " in line]
    assert head == "run   job: 4 steps" and len(lines) == 4
    (second, fourth) = (re.fullmatch(rf" +job: {n} of 4, 0:\d\d:\d\d left  {NOTE}", lines[n - 1]) for n in (2, 4))
    assert second and fourth and "0:00:00 left" in lines[3]
    assert [float(found[1]) for found in (second, fourth)] == pytest.approx(losses[1::2], abs=1e-4)
    assert float(fourth[3]) == pytest.approx(profiling.peak_mib(module.device) / 1024, abs=0.02)
    # The first step warms up and does not count.
    assert (throughput.steps, throughput.tokens) == (3, sum(tokens.of_steps[1:])) and throughput.tokens > 3 * 2 * 10
    assert throughput.rates() == {
        "samples_per_s": 6 / throughput.seconds,
        "tokens_per_s": throughput.tokens / throughput.seconds,
    }
    assert int(fourth[2].replace(",", "")) == round(throughput.tokens / throughput.seconds)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Progress("job", 4, "steps") as shown:
        shown.advance(3, "loss 0.5000  1,200 tokens/s  0.80 GiB")
        shown.advance(1)
    out = capsys.readouterr().out
    assert "4/4" in out and "0:00:00" in out and "loss 0.5000  1,200 tokens/s  0.80 GiB" in out
