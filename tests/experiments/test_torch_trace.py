"""`profiler=torch` and `debug=true`: what they record, what they leave out of the times, what they stand for."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from experiments.torch_trace import RECORDED, TRACE, WARM_UP, TorchTrace
from tests.experiments.conftest import Here, result_of

BATCHES = 6


def events(folder: Path) -> list[str]:
    return [
        event.get("name", "") for event in json.loads(gzip.decompress((folder / TRACE).read_bytes()))["traceEvents"]
    ]


def test_a_few_steps_are_recorded_after_the_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, recording = torch.ones(4, 4), []
    with TorchTrace(tmp_path, torch.device("cpu")) as trace:
        for _ in range(BATCHES):
            recording.append(trace.is_recording)
            a @ a
            trace.step()
    assert recording == [True] * (WARM_UP + RECORDED) + [False] * (BATCHES - WARM_UP - RECORDED)
    assert events(tmp_path).count("aten::mm") == RECORDED
    assert f"profiler  {TRACE} in {tmp_path}" in capfd.readouterr().out


def test_too_few_steps_record_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with TorchTrace(tmp_path, torch.device("cpu")) as trace:
        trace.step()
    assert list(tmp_path.iterdir()) == [] and "nothing recorded" in capfd.readouterr().out
    with TorchTrace(None) as trace:
        assert not trace.is_recording
        trace.step()


def test_an_evaluation_is_traced_beside_the_same_answers(eval_here: Here) -> None:
    words = ["selector=shirg", f"limit={2 * BATCHES}", "batch_size=2"]
    traced, plain = eval_here(*words, "profiler=torch", "study=a"), eval_here(*words, "study=b")
    assert "aten::scaled_dot_product_attention" in events(traced) and not (plain / TRACE).exists()
    results = [result_of(folder) for folder in (traced, plain)]
    assert results[0]["config_hash"] == results[1]["config_hash"] and traced.name == plain.name
    assert results[0]["quality"] == results[1]["quality"]


def test_a_training_is_traced(train_here: Here) -> None:
    folder = train_here("selector=pooled", "optim.steps=3", "optim.warmup=0", "batch_size=2", "profiler=torch")
    assert any("backward" in name.lower() for name in events(folder))
