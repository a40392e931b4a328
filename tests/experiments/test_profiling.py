"""Out of memory: one sentence, a row of its own, and the next job has the memory back."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.analysis.table import collect
from experiments.profiling import is_out_of_memory
from lavida_adapter import Lavida
from shirg import Selector
from tests.experiments.conftest import result_of

Eval = Callable[..., Path]
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_batch_that_is_too_large_becomes_a_row_and_the_study_goes_on(
    kind: str, eval_here: Eval, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise ERRORS[kind]

    with monkeypatch.context() as patch:
        patch.setattr(Lavida if kind == "cpu" else Selector, "generate" if kind == "cpu" else "forward", no_memory)
        job = eval_here("selector=random", "limit=4", "batch_size=2", ok=False)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.fullmatch(
        r"error: out of memory on cpu: weights take \d\.\d\d GiB, and a batch of 2 prompts of 80 tokens about "
        r"\d\.\d\d GiB more; lower batch_size= or budget=",
        line,
    )
    assert result_of(job)["status"] == "oom" and line.endswith(result_of(job)["reason"])
    fine = eval_here("selector=random", "limit=4", "batch_size=1")
    rows = {row["job"]: row for row in collect(fine.parent)}
    assert {name: row["status"] for name, row in rows.items()} == {job.name: "oom", fine.name: "ok"}
    assert "out of memory" in rows[job.name]["reason"]
    again = eval_here("selector=random", "limit=4", "batch_size=2", "resume=true")
    assert again == job and result_of(job)["status"] == "ok"


def test_building_the_model_may_be_what_is_too_much(eval_here: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise ERRORS["cuda"]

    monkeypatch.setattr("experiments.build.build_model", no_memory)
    result = result_of(eval_here("limit=4", ok=False))
    assert result["status"] == "oom"
    assert result["reason"] == (
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): lower batch_size= or budget="
    )


def test_other_errors_are_not_about_memory() -> None:
    assert all(map(is_out_of_memory, ERRORS.values()))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
