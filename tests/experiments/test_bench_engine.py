"""Benches of prefill, steps, caches and whole answers at toy sizes: everything but the durations."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import compare
from experiments.bench import __main__ as command
from experiments.bench import cache_size, decode, encoding, end2end, prefill, profile_cache
from experiments.bench.common import loglog_chart
from tests.experiments.conftest import result_of
from tests.lavida_adapter.tiny import tiny_model

Eval = Callable[..., Path]


def test_decode_has_the_twin_first_and_says_when_ids_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(lm={"n_layers": 3})
    measured = decode.bench("bench_small", model, 40, 8, 4, 2, ["eager"], repeats=2)
    assert [row.name for row in measured.rows] == ["plain twin", "engine=eager"]
    assert all(row.same_ids for row in measured.rows)
    report = measured.report()
    assert (report["prompt"], report["answer"], report["steps"], report["batch"]) == (40, 8, 4, 2)
    assert report["attention"].startswith("sdpa (") and report["reference_elsewhere_s"] == 0.46
    for row in report["rows"]:
        assert row["times_faster"] == report["rows"][0]["whole"]["ms"] / row["whole"]["ms"]
        assert row["step_ms"] == (row["whole"]["ms"] - row["prefill"]["ms"]) / 4
        for stage in ("prefill", "step"):
            assert row["floor"][stage]["times_floor"] > 1, "nothing is faster than the device"
    assert "on one thread of another machine" in measured.lines()[-1]
    monkeypatch.setattr(decode.reference, "plain_generate", lambda *_: torch.zeros(2, 8, dtype=torch.int64))
    wrong = decode.bench("tiny", model, 40, 8, 4, 2, ["eager"], repeats=1)
    assert not wrong.rows[1].same_ids and any("NO" in line for line in wrong.lines())


def test_growth_and_its_exponents() -> None:
    measured = prefill.bench("toy", tiny_model(), [100, 196], 4, 1, "norm_topk", repeats=1)
    assert [row.tokens for row in measured.rows] == [100, 196]
    assert set(measured.exponents) == {"select", "prefill", "plain prefill", "step"}
    assert (figure := measured.figure()) is not None and figure.count("<polyline") == 3
    assert prefill.exponent([1, 10, 100], [5, 500, 50_000]) == pytest.approx(2)
    assert measured.lines()[-1].startswith("exponent")


def test_a_chart_has_a_point_for_every_value() -> None:
    svg = loglog_chart([1, 10, 100], {"a <b>": [1, 10, 100], "c": [3, 3, 3]}, "x", "y")
    assert svg.count("<circle") == 6 and "a &lt;b&gt;" in svg and svg.startswith("<svg")


def test_cache_and_encode() -> None:
    model = tiny_model()
    measured = cache_size.bench("toy", model, 30, 4, 2, repeats=1)
    saved = {row["cache"]: row["saved"] for row in measured.report()["rows"]}
    assert saved["none"] == 0 and saved["cast"] == 0.5 and saved["fp8"] == pytest.approx(0.75, abs=0.01)
    assert measured.rows[0].most == 0 and measured.rows[0].same_top1 == 1
    encoded = encoding.bench("toy", model, [1, 2], repeats=1)
    assert [row.pictures for row in encoded.rows] == [1, 2]
    assert encoded.rows[1].floor["gflop"] == 2 * encoded.rows[0].floor["gflop"]


def test_a_batch_size_does_not_change_answers() -> None:
    measured = end2end.run(
        device=torch.device("cpu"), model="tiny", batch=[1, 4], only=["shirg", "B0"], samples=8, repeats=2
    )
    assert [(row.system, row.batch) for row in measured.rows] == [("shirg", 1), ("shirg", 4), ("B0", 1), ("B0", 4)]
    assert all(row["same_answers"] == 8 for row in measured.report()["rows"])


def test_options_may_be_spelt_like_overrides() -> None:
    given = command.parse(["decode", "model=bench_tiny", "--prompt", "64", "repeats=2"])
    assert (given.model, given.prompt, given.repeats, given.answer) == ("bench_tiny", [64], 2, 32)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    command.main(
        ["decode", "model=bench_tiny", "engine=eager", "prompt=64", "answer=4", "repeats=1", f"out={out}", "threads=1"]
    )
    report = json.loads(out.read_text())
    assert report["command"].startswith("python -m experiments.bench decode model=bench_tiny")
    assert report["rows"][1]["same_ids"] is True
    with pytest.raises(SystemExit):
        command.main(["decode", "model=none_such"])
    assert "model=none_such: there is no such option; choose one of bench_small" in capsys.readouterr().err


def test_from_a_profile_to_a_row(
    eval_here: Eval, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    lines = compare.table(cut.parent, "cache", "none")
    assert [line.split(" | ")[1] for line in lines[2:]] == ["none", "int8", "layer_retention"]
    assert lines[0].split(" | ")[4:6] == ["fine", "fine, against none"]
    assert lines[2].split(" | ")[5] == "-" and "[" in lines[3]
    with pytest.raises(ValueError, match="no finished evaluation has cache=fp8"):
        compare.table(cut.parent, "cache", "fp8")
    with pytest.raises(FileNotFoundError, match="there are no finished evaluations"):
        compare.table(tmp_path / "nowhere", "cache", "none")
    with pytest.raises(ValueError, match="forget=1.5"):
        profile_cache.profile_data([], 1.5, 2, out)
