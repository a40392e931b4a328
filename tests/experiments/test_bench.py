"""The benches at toy sizes: everything but the durations, and that what is compared computes the same."""

import importlib
import inspect
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments import compare
from experiments.bench import __main__ as command
from experiments.bench import (
    answer_rows,
    cache_size,
    decode,
    encoding,
    end2end,
    prefill,
    profile_cache,
    reference,
    selectors,
    sharing,
    training_step,
    unequal_prompts,
)
from experiments.bench.common import Floors, table_of, time_in_turns, times_floor
from experiments.jobs.sample_rows import digests_of, read_facts, read_rows
from experiments.profiling import NOISE, Limits, Work, cost_of, time_call
from experiments.schema import CONF
from lavida_adapter import LavidaConfig, LladaConfig, VisionConfig
from shirg import UserError
from tests.experiments.conftest import ROOT, result_of
from tests.lavida_adapter.tiny import noise, tiny_model

Eval = Callable[..., Path]

CPU = torch.device("cpu")
TOY = LavidaConfig(
    vision=VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    ),
    lm=LladaConfig(d_model=24, n_heads=2, n_kv_heads=2, n_layers=1, mlp_hidden_size=32),
    image_grid_pinpoints=((128, 128),),
)


def test_the_clock_counts_the_calls_and_reports_milliseconds() -> None:
    calls: list[int] = []
    timing = time_call(lambda: calls.append(1), CPU, repeats=5, warm_up=2)
    report = timing.report()
    assert len(calls) == 7 and len(report["ms_all"]) == len(timing.cpu_ms) == 5
    assert report["ms"] == timing.median == sorted(report["ms_all"])[2]
    assert report["ms_min"] == timing.least == min(report["ms_all"])
    assert 0 <= report["ms_iqr"] <= max(report["ms_all"]) - min(report["ms_all"])


def test_a_table_shows_the_rows_of_the_report() -> None:
    rows = [{"name": "a", "n": 3, "pack": None}, {"name": "b", "n": None, "pack": {"ms": 1.25}}]
    table = table_of(rows, {"name": ("name", ""), "n": ("n", "d"), "ms": ("pack.ms", ".1f"), "x": ("none", ".1f")})
    assert table.to_dict("list") == {"name": ["a", "b"], "n": ["3", "-"], "ms": ["-", "1.2"], "x": ["-", "-"]}


def test_every_selector_is_timed_beside_the_naive_one_and_the_tower() -> None:
    names = selectors.everything()
    assert {path.stem for path in (CONF / "selector").glob("*.yaml")} < set(names) and "topv scope=global" in names
    measured = selectors.measure(TOY, names, CPU, torch.float32, [1, 2], repeats=3)
    report = measured.report
    rows = report["selectors"]
    assert [(row["selector"], row["batch"]) for row in rows] == [(name, b) for b in (1, 2) for name in names]
    tokens = {row["selector"]: row["tokens"] for row in rows}
    assert tokens["shirg"] == tokens["saint"] == (320, TOY.budgets["base"])
    # A canvas of 7/4 of a view in one view, and two views of 7/6 of it.
    assert (tokens["shirg_672"][0], tokens["shirg_fovea"][0]) == (14**2, 2 * 9**2)
    assert set(report["encode"]) == {"lavida_tiles", "single_672", "fovea"}
    for row in rows:
        assert len(row["ms_all"]) == 3 and row["ms"] == sorted(row["ms_all"])[1] and row["ms_min"] == min(row["ms_all"])
        assert row["ms_per_picture"] == row["ms"] / row["batch"]
        assert row["times_faster_than_naive"] == report["naive"]["ms"] / row["ms_per_picture"]
        assert row["share_of_encode"] == row["ms_per_picture"] / report["encode"][row["geometry"]]["ms_min"]
    title, *table = measured.lines()
    assert "float32" in title and len(table) == 1 + 1 + 3 + len(rows) and len({len(line) for line in table}) == 1


@pytest.mark.parametrize(("family", "ran"), [("llada", [8, 8]), ("dream", [8, 6])])
def test_decode_compares_every_engine_with_the_plain_one(
    family: str, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Dream's time grid over seven masks, two steps commit nothing: only the plain one runs them."""
    model = tiny_model(lm={"family": family, "n_layers": 3})
    measured = decode.measure("bench_small", model, 40, 8, 8, 2, ["eager"], repeats=2)
    report = measured.report
    assert [(row["name"], row["same_ids"]) for row in report["rows"]] == [("plain twin", True), ("engine=eager", True)]
    assert (report["prompt"], report["answer"], report["steps"], report["batch"]) == (40, 8, 8, 2)
    assert [row["forwards"] for row in report["rows"]] == ran
    assert report["attention"]["eager"].startswith("sdpa (") and report["reference_elsewhere_s"] == 0.46
    for row in report["rows"]:
        assert row["times_faster"] == report["rows"][0]["whole"]["ms"] / row["whole"]["ms"]
        assert row["step_ms"] == (row["whole"]["ms"] - row["prefill"]["ms"]) / row["forwards"]
        for stage in ("prefill", "step"):
            assert row["floor"][stage]["times_floor"] > 1 - NOISE, "nothing is faster than the device"
    assert "on one thread of another machine" in measured.lines()[-1]
    monkeypatch.setattr(decode.reference, "plain_generate", lambda *_: torch.zeros(2, 8, dtype=torch.int64))
    wrong = decode.measure("tiny", model.to(torch.bfloat16), 40, 8, 4, 2, ["eager"], repeats=1)
    assert wrong.report["dtype"] == "bfloat16"
    assert not wrong.report["rows"][1]["same_ids"] and any("NO" in line for line in wrong.lines())


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_plain_one_computes_what_the_model_computes(family: str) -> None:
    """Over a prompt, and over an answer behind it; only Dream's public code caches keys that are rotated already."""
    lm = tiny_model(lm={"family": family, "n_kv_heads": 2}).lm
    prompt, answer = noise(2, 9, 32), noise(2, 5, 32, seed=1)
    angles, cache = reference.angles_of(lm, 14), lm.prefill(prompt)
    logits, past = reference.plain_forward(lm, prompt, None, angles)
    torch.testing.assert_close(logits, lm.logits(lm(prompt)), rtol=0, atol=1e-4)
    logits, longer = reference.plain_forward(lm, answer, past, angles)
    torch.testing.assert_close(logits, lm.logits(lm.decode(answer, cache)), rtol=0, atol=1e-4)
    for (keys, values), whole, own, expected in zip(past, longer, cache.keys, cache.values, strict=True):
        assert torch.allclose(keys, own, atol=1e-5) is (family == "dream")
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
        assert whole[0].shape == (2, 2, 14, 8)


def test_slots_that_are_open_at_the_steps_that_commit_some() -> None:
    assert decode.mean_open([1] * 32) == 16.5
    assert decode.mean_open([0, 0, 2, 1, 0, 1]) == (4 + 2 + 1) / 3


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_unequal_prompts_are_prefilled_in_turns(family: str) -> None:
    measured = unequal_prompts.measure("toy", tiny_model(lm={"family": family}), [14, 9, 3], 4, ["eager"], repeats=3)
    padded, joined = measured.report["rows"]
    assert (padded["name"], joined["name"]) == ("eager, padded", "eager, joined")
    assert padded["difference"] == 0 and padded["times_faster"] == 1
    assert 0 < joined["difference"] < 1e-5 and joined["times_faster"] == padded["ms"] / joined["ms"]
    assert measured.report["share_of_tokens"] == pytest.approx(26 / 42)
    assert "prefills of unequal prompts: sdpa, one by one" in measured.report["attention"]
    cost = cost_of(tiny_model(lm={"family": family}).config.lm, torch.float32)
    alone, twice = unequal_prompts.least_work(cost, [14]), unequal_prompts.least_work(cost, [14, 14])
    assert twice.flops == 2 * alone.flops and alone.bytes < twice.bytes < 2 * alone.bytes


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_prefill_fits_exponents_and_draws_them(family: str) -> None:
    measured = prefill.measure("toy", tiny_model(lm={"family": family}), [100, 196], 4, 1, "norm_topk", repeats=1)
    report = measured.report
    assert [row["tokens"] for row in report["rows"]] == [100, 196]
    assert set(report["exponents"]) == {"select", "prefill", "plain prefill", "step"}
    assert measured.lines()[-1].startswith("exponents: select ")
    assert measured.figure is not None
    (axes,) = measured.figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    for line, stage in zip(axes.lines, prefill.DRAWN, strict=True):
        assert list(line.get_ydata()) == [row[stage]["ms"] for row in report["rows"]]
        assert line.get_label() == f"{stage} ~ N^{report['exponents'][stage]:.2f}"
    assert prefill.exponent([1, 10, 100], [5, 500, 50_000]) == pytest.approx(2)
    alone = prefill.measure("toy", tiny_model(), [100], 4, 1, "norm_topk", repeats=1)
    assert alone.figure is None and alone.report["exponents"] is None and not alone.notes


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_smaller_caches_save_bytes_and_the_whole_one_does_not_drift(family: str) -> None:
    model = tiny_model(lm={"family": family})
    rows = {row["cache"]: row for row in cache_size.measure("toy", model, 30, 4, 2, repeats=1).report["rows"]}
    assert rows["none"]["saved"] == 0 and rows["cast"]["saved"] == 0.5
    assert rows["fp8"]["saved"] == pytest.approx(0.75, abs=0.01)
    assert rows["none"]["max_logit_drift"] == 0 and rows["none"]["same_top1"] == 1 and rows["none"]["pack"] is None
    assert rows["int8"]["max_logit_drift"] > 0


def test_the_work_of_the_tower_grows_with_the_pictures() -> None:
    one, two = encoding.measure("toy", tiny_model(), [1, 2], repeats=1).report["rows"]
    assert (one["pictures"], two["pictures"]) == (1, 2)
    assert two["floor"]["gflop"] == 2 * one["floor"]["gflop"]
    assert two["tower_ms_per_picture"] == two["tower"]["ms"] / 2


def test_calls_that_are_compared_take_turns() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    timings = time_in_turns(calls, CPU, repeats=3, warm_up=1)
    assert "".join(order) == 4 * "abc"
    assert all(len(timing.report()["ms_all"]) == 3 for timing in timings.values())


def test_a_slow_minute_between_is_no_difference() -> None:
    """The machine has half the speed from the third batch on: each system is twice as slow, and their ratio stays."""
    fast, slow = end2end._Pass([1.0, 1.0, 2.0, 2.0]), end2end._Pass([1.5, 1.5, 3.0, 3.0])
    assert end2end.over([slow], [fast]) == 1.5 and end2end.over([fast], [fast]) == 1


def test_limits_of_a_slow_minute_mark_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time of 95 ms whose floor is 50 ms before, and 100 ms or 120 ms by the limits measured after it."""
    work = Work(flops=100.0, bytes=0.0)
    for rates, times, doubts in (((2000.0, 800.0), 1.9, 0), ((900.0, 1000.0), 0.95, 0), ((500.0, 830.0), 0.79, 1)):
        given = iter(rates)
        monkeypatch.setattr("experiments.bench.common.measure_limits", lambda *_, g=given: Limits({1: 1.0}, next(g)))
        floors = Floors(CPU, torch.float32)
        row = {"floor": floors.over(95.0, work)}
        limits, said = floors.settle()
        assert limits["matmul"] == max(rates) and row["floor"]["times_floor"] == pytest.approx(times, abs=0.01)
        assert len(said) == doubts
        (cell,) = table_of([row], {"x floor": ("floor.times_floor", times_floor)})["x floor"]
        assert cell == f"{row['floor']['times_floor']:.2f}" + "!" * doubts
    assert said == (
        "! 95 ms is below the floor of 120 ms by more than 10%, which is noise: the time or the limits are wrong",
    )


def test_a_batch_size_does_not_change_answers() -> None:
    measured = end2end.run(device=CPU, model="tiny", batch=[1, 4], only=["shirg", "B0"], samples=8, repeats=2)
    rows = measured.report["rows"]
    assert [(row["system"], row["batch"]) for row in rows] == [("shirg", 1), ("shirg", 4), ("B0", 1), ("B0", 4)]
    assert all(row["same_answers"] == 8 and len(row["seconds_all"]) == 2 for row in rows)
    assert all(row["over_first"] == 1 for row in rows[:2]) and all(0.2 < row["over_first"] < 5 for row in rows[2:])
    for row in rows:
        assert row["samples_per_s"] == pytest.approx(8 / min(row["seconds_all"])), "the lower median of two"


def test_shares_and_rates_of_training_follow_from_the_steps() -> None:
    steps = [
        {"data": 10.0, "forward": 40.0, "backward": 40.0, "optimiser": 10.0},
        {"data": 0.0, "forward": 60.0, "backward": 30.0, "optimiser": 10.0},
        {"data": 20.0, "forward": 100.0, "backward": 60.0, "optimiser": 20.0},
    ]
    found = training_step.summarise(8, steps, tokens=2000)
    assert found["step_ms"] == 100
    assert found["samples_per_s"] == pytest.approx(3 * 8 / 0.4)
    assert found["tokens_per_s"] == pytest.approx(2000 / 0.4)
    assert found["shares"] == pytest.approx({"data": 0.075, "forward": 0.5, "backward": 0.325, "optimiser": 0.1})


def test_training_steps_are_timed_by_phase() -> None:
    steps, tokens, dtype = training_step.time_training("tiny", "adapt", CPU, batch=3, workers=0, repeats=2)
    assert len(steps) == 2
    for step in steps:
        assert step.keys() == set(training_step.PHASES) and step["forward"] > 0 and step["backward"] > 0
    # 80 picture tokens, the prompt and the three slots of the answer: the same for every glyph question.
    assert tokens % (2 * 3) == 0 and tokens > 2 * 3 * 83
    assert dtype == "float32"


def test_steps_of_a_relevance_head_are_timed_by_phase(capsys: pytest.CaptureFixture[str]) -> None:
    measured = training_step.run(device=CPU, model="tiny", stage="gate", batch=[2], workers=0, repeats=2)
    (row,) = measured.report["train"]
    assert row["shares"]["forward"] > 0 and row["shares"]["backward"] > 0
    assert row["tokens_per_s"] is None and len(row["ms_all"]) == 2
    assert capsys.readouterr().out.count("data  ") == 1, "examples are filtered and counted once"


def test_rows_leave_memory_as_they_are_journaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 980 kept tokens is 35 KiB as Python objects; what remains of it is its id."""
    monkeypatch.setattr("experiments.jobs.sample_rows.ROW_GROUP", 64)
    answer_rows.job(tmp_path / "warm", 32, 980, 16)
    peaks = {}
    for n in (200, 400):
        tracemalloc.start()
        answer_rows.job(tmp_path / str(n), n, 980, 16)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[400] - peaks[200]) / 200 < 400, f"{peaks} bytes"


def test_rows_of_a_torn_journal_are_those_of_the_whole(tmp_path: Path) -> None:
    answer_rows.job(tmp_path, 50, 20, 8)
    rows, digests = read_rows(tmp_path / "samples.parquet"), answer_rows._torn(tmp_path)
    answer_rows.job(tmp_path, 50, 20, 8)
    assert read_rows(tmp_path / "samples.parquet") == rows and len(rows) == 50
    assert digests_of(read_facts(tmp_path / "samples.parquet")) == digests


@pytest.mark.parametrize("name", command.PARTS)
def test_every_part_takes_the_options_that_it_offers(name: str) -> None:
    run = importlib.import_module(f"experiments.bench.{command.PARTS[name].module}").run
    assert set(inspect.signature(run).parameters) == {"device", *command.PARTS[name].defaults}


def test_options_may_be_spelt_like_overrides() -> None:
    given = command.parse(["decode", "model=bench_tiny", "--prompt", "64", "repeats=2"])
    assert (given.model, given.prompt, given.repeats, given.answer) == ("bench_tiny", [64], 2, 32)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prefill.json"
    command.main(["prefill", "model=bench_tiny", "prompt=64,96", "answer=4", "repeats=1", f"out={out}", "threads=1"])
    written = json.loads(out.read_text())
    assert written["command"].startswith("python -m experiments.bench prefill model=bench_tiny")
    assert written["environment"]["threads"] == 1 and written["environment"]["device"] == "cpu"
    assert {"git", "torch", "python", "dtype"} <= written["environment"].keys()
    assert [row["tokens"] for row in written["rows"]] == [64, 96]
    assert "vision tokens N" in out.with_suffix(".svg").read_text()
    printed = capsys.readouterr().out
    assert f"written: {out}" in printed and f"{written['rows'][1]['prefill']['ms']:.2f}" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["selectors", "--only", "foo"], "selector=foo: there is no such option; choose from "),
        (["selectors", "--batch", "0,x"], "argument --batch: '0' is not a whole number from 1 on"),
        (["selectors", "--threads", "0"], "argument --threads: '0' is not a whole number from 1 on"),
        (["selectors", "--dtype", "int8"], "argument --dtype: 'int8' is not float32, bfloat16 or float16"),
        (["selectors", "--device", "abacus"], "device=abacus: give auto, cpu"),
        (["decode", "model=none_such"], "model=none_such: there is no such option; choose one of bench_small"),
        (["decode", "prompt=8,9"], "bench decode takes one value of --prompt: give it once, not 8,9"),
        (["jobs", "--selectors", "99"], "--selectors 99: give 2 to "),
        (["decoders"], "decoders: there is no such choice; did you mean decode?"),
        ([], "the following arguments are required: PART"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_help_imports_no_torch() -> None:
    """And lists every part and the options of each."""
    code = (
        "import sys\nfrom experiments.bench import __main__ as command\n"
        "for part in ([], *([name] for name in command.PARTS)):\n"
        "    try:\n        command.main([*part, '--help'])\n"
        "    except SystemExit as stop:\n        assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--threads") >= len(command.PARTS) and all(name in done.stdout for name in command.PARTS)


def test_a_sweep_of_jobs() -> None:
    from experiments.bench.sweep_overhead import run

    result = run(device=torch.device("cpu"), model="tiny", selectors=2, samples=2)
    assert (result.report["jobs"], result.report["models_read"]) == (2, 1)
    (row,) = result.report["rows"]
    assert row["job"].endswith("selector-divprune")  # the second one: the first waits for imports
    assert 0 < row["answers_s"] < row["wall_s"] and 0 < row["cpu_s"] < 60
    assert row["overhead_s"] == result.report["overhead_s"]["max"] == row["wall_s"] - row["answers_s"]


def test_weights_that_keep_their_dtype_take_no_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MiB of weights."""
    sizes = ("d_model=512", "n_heads=4", "n_kv_heads=4", "n_layers=4", "mlp_hidden_size=1024", "vocab_size=4096")
    monkeypatch.setattr(sharing, "SIZES", sizes)
    result = sharing.run(device=CPU, model="bench_small", processes=1, dtypes=["bfloat16", "float32"])
    mapped, converted = result.report["rows"]
    assert mapped["own_mib"] < 10 < 30 < converted["own_mib"]
    assert converted["file_mib"] < 10 < mapped["file_mib"]


def test_from_a_profile_to_a_row(
    eval_here: Eval, tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    profile_cache.main(["forget=0.3", "limit=2", f"out={out}", f"model.path={tiny_weights}", "selector=full"])
    (share,) = json.loads(out.read_text())["forget"]
    assert share == pytest.approx(0.3, abs=0.01)
    few = ("limit=4", "selector=full")
    whole = result_of(eval_here(*few))["decoding"]
    cut = eval_here(*few, "cache=layer_retention", f"cache.profile={out}")
    packed = eval_here(*few, "cache=int8")
    assert whole["drift"] is None and whole["same_top1"] is None
    assert result_of(cut)["decoding"]["cache_bytes"] == pytest.approx((1 - share) * whole["cache_bytes"], rel=0.01)
    assert 0 < result_of(packed)["decoding"]["drift"] < result_of(cut)["decoding"]["drift"]
    assert result_of(packed)["cache"] == {"class": "Int8", "after": "prefill", "budget": None}
    table = compare.table_of(compare.compare([cut.parent], "cache", "none"), "cache")
    assert list(table["cache"]) == ["none", "int8", "layer_retention"]
    assert "[" in table["fine, against none"][1] and "[" not in table["fine, against none"][0]
    with pytest.raises(UserError, match="no finished evaluation has cache=fp8"):
        compare.compare([cut.parent], "cache", "fp8")
    with pytest.raises(UserError, match="there are no finished evaluations"):
        compare.compare([tmp_path / "nowhere"], "cache", "none")
    capfd.readouterr()
    with pytest.raises(SystemExit):
        profile_cache.main(["forget=1.5", "selector=full"])
    assert "forget=1.5: give the share of all rows to drop" in capfd.readouterr().err


@pytest.mark.slow
def test_hostile_inputs(tmp_path: Path) -> None:
    """In a process of its own, because each input is a child that is forked from it."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "hostile", "only=classes", "device=cpu", f"out={tmp_path}/x.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "16 inputs: 16 refused in one sentence, 0 ran, 0 faults" in done.stdout
