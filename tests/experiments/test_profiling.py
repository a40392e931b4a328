"""Times, memory and the physical floor: stages, out of memory, rates of this machine, impossible rows."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import build
from experiments.analysis.columns import columns
from experiments.analysis.table import collect
from experiments.kept_between_jobs import release_model
from experiments.profiling import (
    Limits,
    LmCost,
    Work,
    best_limits,
    cost_of,
    flags,
    is_out_of_memory,
    resolve_device,
    use_device,
)
from lavida_adapter import DreamConfig, Lavida, LavidaConfig, LladaConfig
from lavida_adapter.timing import StageTimer
from shirg import Selector, UserError
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

    release_model()  # one of an earlier test would be used again, and none be built
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


CPU = torch.device("cpu")
LIMITS = Limits({100: 1000.0, 10_000: 100.0}, matmul=2000.0)


def test_counts_of_the_published_sizes() -> None:
    """Weights read at a step: all but the input embedding, 15.0 GB; a cached token: half a MiB."""
    cost = cost_of(LavidaConfig().lm, torch.bfloat16)
    assert cost.cache_bytes(1) == 2**19
    step = cost.step(0, 32, 32)
    assert step.bytes == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 4096 * cost.vocab)
    assert step.bytes == pytest.approx(15.0e9, rel=0.01)
    assert cost.prefill(1068).flops == pytest.approx(15.1e12, rel=0.01)
    assert cost.step(1068, 32, 32, batch=2).bytes - step.bytes == 2 * 1068 * 2**19


def test_counts_of_dream() -> None:
    """A cached token takes 56 KiB, a ninth of LLaDA's; what a step reads is hardly less."""
    lm = DreamConfig()
    dream, llada = (cost_of(config, torch.bfloat16) for config in (lm, LladaConfig()))
    assert dream.cache_bytes(1) == 2 * 28 * (4 * 128) * 2 == 56 * 2**10
    assert llada.cache_bytes(1) / dream.cache_bytes(1) == pytest.approx(9.14, abs=0.01)
    norms_and_biases = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    products = 28 * dream.block_weights + 2 * 3584 * 152064
    assert products + norms_and_biases == 7_615_616_512
    assert dream.step(0, 32, 32).bytes == 2 * (products - 3584 * 152064)


def test_a_shift_costs_one_more_row_of_the_last_block() -> None:
    sizes = {"d_model": 4, "kv_width": 2, "mlp": 6, "n_layers": 2, "vocab": 10, "item_bytes": 4}
    plain, shifted = LmCost(**sizes), LmCost(**sizes, shift=1)
    query_and_out, swiglu = 2 * 4 * 4, 3 * 4 * 6
    one_row = 2 * (query_and_out + swiglu) + 2 * (2 * 5 * 4)
    assert shifted.prefill(5, batch=3).flops - plain.prefill(5, batch=3).flops == 3 * one_row
    assert shifted.prefill(5, batch=3).bytes - plain.prefill(5, batch=3).bytes == 4 * (query_and_out + swiglu)
    assert shifted.step(5, 2, 1) == plain.step(5, 2, 1)


def test_counts_by_hand() -> None:
    cost = LmCost(d_model=4, kv_width=2, mlp=6, n_layers=2, vocab=10, item_bytes=4)
    block = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6
    assert (cost.block_weights, cost.kv_weights) == (block, 16)
    assert cost.prefill(5).flops == 2 * 5 * block + 4 * 25 * 4 + 2 * 5 * 16
    assert cost.prefill(5, batch=3).flops == 3 * cost.prefill(5).flops
    # Two layers for two answer tokens, but the last one's output and the head for one of them.
    products = 2 * 2 * block + (2 * 2 * 16 + 2 * (block - 16)) + 2 * 4 * 10
    assert cost.step(5, 2, 1).flops == products + 4 * (5 + 2) * 4 * (2 + 1)
    assert cost.step(5, 2, 1).bytes == 4 * (2 * block + 40) + cost.cache_bytes(5)


def test_the_floor_is_the_slower_of_moving_and_multiplying() -> None:
    assert LIMITS.floor_ms(Work(flops=2000, bytes=1)) == 1000
    assert LIMITS.floor_ms(Work(flops=1, bytes=200)) == 200
    assert LIMITS.floor_ms(Work(flops=1, bytes=20_000)) == 200_000, "what no cache holds moves slowly"
    assert LIMITS.floor_ms(Work(flops=1, bytes=20_000), lenient=True) == 20_000


def test_what_cannot_be_is_flagged() -> None:
    """The floors are 1,000 and 100 ms; a time down to 10 % below its floor is within the noise of both."""
    floor = {"prefill": Work(2000, 0), "denoise": Work(0, 100)}
    times = {"ms_per_sample": {"prefill": 899.0, "denoise": 91.0, "select": 0.0}, "peak_memory_mib": 3.0}
    assert flags(times, 4 * 2**20, LIMITS, floor) == {
        "prefill ms": "899 ms is below the floor of 1e+03 ms by more than 10%, which is noise",
        "peak memory MiB": "3 MiB is below the 4 MiB of the weights",
    }
    honest = {"ms_per_sample": {"prefill": 901.0, "denoise": 101.0}, "peak_memory_mib": None}
    assert flags(honest, 4 * 2**20, LIMITS, floor) == {}


def test_a_slow_minute_refuses_no_figure() -> None:
    """Limits at half the rates alone would flag it; with those of a faster minute beside them it is no matter."""
    slow = Limits({100: 500.0, 10_000: 50.0}, matmul=1000.0)
    times, floor = {"ms_per_sample": {"prefill": 1000.0}, "peak_memory_mib": None}, {"prefill": Work(2000, 0)}
    assert list(flags(times, 0, slow, floor)) == ["prefill ms"]
    for limits in (slow.better(LIMITS), LIMITS.better(slow)):
        assert limits == LIMITS and flags(times, 0, limits, floor) == {}
    mixed = slow.better(Limits({100: 400.0, 10_000: 60.0}, matmul=900.0))
    assert mixed == Limits({100: 500.0, 10_000: 60.0}, matmul=1000.0)
    assert Limits.of(json.loads(json.dumps(mixed.report()))) == mixed


def test_limits_only_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = best_limits(tmp_path, CPU, torch.float32)
    assert first.matmul > 1e9 and all(rate > 1e8 for rate in first.copy.values())
    slow = Limits({size: rate / 3 for size, rate in first.copy.items()}, first.matmul * 2)
    monkeypatch.setattr("experiments.profiling.measure_limits", lambda *_: slow)
    assert best_limits(tmp_path, CPU, torch.float32) == Limits(first.copy, first.matmul * 2)
    (stored,) = json.loads((tmp_path / "limits.json").read_text()).values()
    assert Limits.of(stored) == Limits(first.copy, first.matmul * 2)


@pytest.mark.parametrize("damage", ["[]", "[", "null", "[" * 100_000, "3", "{}", '{"copy": 3}', '{"copy": {"a": 1}}'])
def test_damaged_limits_are_measured_again(tmp_path: Path, damage: str) -> None:
    """All of the file, or the entry of this device."""
    path = tmp_path / "limits.json"
    best_limits(tmp_path, CPU, torch.float32)
    (device,) = json.loads(path.read_text())
    for text in (damage, f'{{"{device}": {damage}}}'):
        path.write_text(text)
        assert best_limits(tmp_path, CPU, torch.float32).matmul > 1e9
        assert json.loads(path.read_text())[device]["matmul"] > 1e9


def test_a_row_that_beats_its_machine_says_so(eval_here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured before and after the answers; the better of both must be slow for a flag."""
    rates = [1e15, 1.0]
    monkeypatch.setattr("experiments.profiling.measure_limits", lambda *_: Limits({100: 1e15}, rates.pop()))
    job = eval_here("selector=random", "limit=4")
    assert not rates and result_of(job)["times"]["flags"] == {}
    assert "flags" not in [c.title for c in columns(collect(job.parent))]
    (job.parent / "limits.json").unlink()
    rates = [1.0, 1.0]
    job = eval_here("selector=random", "limit=4", "overwrite=true")
    (row,) = collect(job.parent)
    assert row["flags"].count("is below the floor of") == 2
    shown = {c.title: c.texts for c in columns([row])}
    assert shown["denoise ms"] == [f"{row['denoise ms']:.2f}!"] and row["flags"] in shown["flags"]


def test_stage_times_add_up_and_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.25, 2.0, 2.5, 3.0, 3.125])
    monkeypatch.setattr("lavida_adapter.timing.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timer = StageTimer(torch.device("cpu"))
    for name in ("select", "select", "prefill"):
        with timer.stage(name):
            pass
    assert timer.collect() == {"select": 750.0, "prefill": 125.0}
    assert timer.collect() == {}


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("cuda", "cuda:0"), ("auto", "cuda:0")]
)
def test_the_device_of_a_job_becomes_the_current_one(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and CUDA graphs use the current device, whatever device the tensors are on."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    assert use_device(name) == torch.device(device)
    assert seen == ([] if device == "cpu" else [torch.device(device)]), "torch refuses one without a number"


def test_flash_attention_in_float32_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: object())
    cfg = build.compose_eval("model=tiny", "attention=flash", "dtype=float32")
    with pytest.raises(UserError, match="attention=flash computes in bfloat16 or float16 only"):
        build.build_model(cfg, torch.device("cpu"))


@pytest.mark.gpu
def test_stage_times_on_a_gpu_include_the_work_that_was_queued() -> None:
    device = resolve_device("cuda")
    timer, x = StageTimer(device), torch.randn(4096, 4096, device=device)
    with timer.stage("warm"):
        x @ x
    timer.collect()
    with timer.stage("prefill"):
        for _ in range(20):
            x @ x
    with timer.stage("select"):
        pass
    ms = timer.collect()
    assert ms["prefill"] > 20 * 2 * 4096**3 / 2e15 * 1000
    assert ms["select"] < ms["prefill"]
