"""The GPU bench, rehearsed on a CPU at toy size: its rows, its limits of time, its tables; it needs no Hydra."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from experiments.bench import gpu, roofline
from experiments.bench.recorder import Recorder, short, take_turns, time_ms
from experiments.bench.stage_times import SYSTEMS, tower_work
from experiments.bench.true_size import main, published, random_model, toy
from tests.experiments.conftest import ROOT

WITHOUT_HYDRA = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hydra", "omegaconf", "rapidfuzz"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from experiments.bench.true_size import main
main(sys.argv[1:])
"""

PARTS = {
    "systems",
    "encoding",
    "reference",
    "steps",
    "agreement",
    "selectors",
    "kernel",
    "attention",
    "kernels",
    "unequal",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a whole run at toy size, in a process that has no Hydra."""
    file = tmp_path_factory.mktemp("gpu") / "toy.json"
    words = ["--out", str(file), "--size", "toy", "--device", "cpu", "--dtype", "float32", "--rounds", "1"]
    words += ["--batch", "1,2", "--engines", "eager", "--commit", "abc"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_HYDRA, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_every_part_is_measured_without_hydra(rehearsed: dict[str, Any]) -> None:
    rows = rehearsed["rows"]
    assert {row["part"] for row in rows} == PARTS
    assert [row for row in rows if "error" in row] == []
    assert [row["part"] for row in rows if "skipped" in row] == [
        "kernel",
        "attention",
        *["kernels"] * 3,
    ], "they need a GPU"
    systems = [row for row in rows if row["part"] == "systems"]
    assert [(row["batch"], row["name"]) for row in systems] == [(b, name) for b in (1, 2) for name in SYSTEMS]
    for row in systems:
        stages = {"tower", "select", "project", "prefill", "denoise", "step", "wall"}
        assert stages <= row["ms"].keys() and min(row["ms"].values()) > 0 and row["forwards"] == 30
        assert sum(row["ms"][stage] for stage in stages - {"step", "wall"}) <= row["ms"]["wall"]
    tokens = {row["name"]: row["visual_tokens"] for row in systems}
    assert tokens == {"B0": 88, "P1": 80, "P1 matched": 88, "S1": 100, "S2": 100, "B1": 336}
    assert {row["prefix"] - row["visual_tokens"] for row in systems} == {84}
    unequal = [row for row in rows if row["part"] == "unequal"]
    assert [(row["engine"], row["name"], row["lengths"]) for row in unequal] == [
        ("eager", way, [1092, 918]) for way in ("padded", "joined")
    ]
    assert rehearsed["machine"]["commit"] == "abc" and rehearsed["limits_after"]["matmul"] > 0


def test_the_table_has_every_row(rehearsed: dict[str, Any]) -> None:
    text = "\n".join(roofline.lines(rehearsed))
    for row in rehearsed["rows"]:
        assert str(row.get("name", row["part"])) in text
    assert "NOT MEASURED kernel: needs CUDA" in text


def test_a_time_below_its_floor_is_shown_with_a_mark() -> None:
    slow = {"copy": {"100": 1e3, "1000": 2e3}, "matmul": 5e3}
    fast = {"copy": {"100": 3e3, "1000": 1e3}, "matmul": 4e3}
    limits = roofline.better(slow, fast)
    assert limits.copy == {100: 3e3, 1000: 2e3} and limits.matmul == 5e3
    row = {"ms_all": {"step": [100.0, 400.0, 900.0], "tower": [1.0]}, "work": {"step": [1000.0, 1000.0]}}
    assert roofline.times_floor(row, "step", limits) == pytest.approx(0.8)  # 1000 bytes at 2000 a second are 500 ms
    assert roofline.ratio(0.8) == "0.80!" and roofline.ratio(0.98) == "0.98"
    assert roofline.times_floor(row, "tower", limits) is None and roofline.ratio(None) == "-"


def test_turns_over_pictures_of_other_sizes(tmp_path: Path) -> None:
    """Each turn answers the next picture, the same for all systems, and is compared with the turn beside it."""
    files = [tmp_path / f"{width}.png" for width in (128, 40, 64)]
    for path, height in zip(files, (128, 128, 64), strict=True):
        Image.new("RGB", (int(path.stem), height), (90, 30, 200)).save(path)
    words = ["--out", str(tmp_path / "r.json"), "--size", "toy", "--device", "cpu", "--dtype", "float32"]
    words += ["--batch", "1", "--engines", "eager", "--parts", "systems", "--rounds", "3", "--answer", "4"]
    main([*words, "--steps", "2", "--pictures", ",".join(map(str, files))])
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    tokens = {name: [turn["visual_tokens"] for turn in row["turns"]] for name, row in rows.items()}
    assert tokens["B0"] == tokens["P1 matched"] == [88, 40, 36] and tokens["P1"] == [80, 80, 80]
    assert [row["visual_tokens"] for row in rows.values()] == [88, 80, 88, 100, 100, 336]
    assert rows["B0"]["forwards"] == 2 and all(row["peak_mib"] > 100 for row in rows.values())
    assert roofline.visual_tokens(rows["B0"]) == "36-88" and roofline.visual_tokens(rows["P1"]) == "80"

    walls = {"B0": [1.0, 2.0, 10.0], "P1": [2.0, 2.0, 11.0]}
    timed = {
        name: {"ms_all": {"wall": ms, "relevance": [1.0, 2, 9], "select": [1.0, 0, 9], "tower": [10.0, 100, 4]}}
        for name, ms in walls.items()
    }
    assert roofline.over_base(timed["P1"], timed["B0"]) == 1.1 and roofline.over_base(timed["P1"], None) is None
    assert roofline.gate_percent(timed["P1"] | {"n": 3}) == 20.0
    with pytest.raises(SystemExit):
        main([*words, "--pictures", str(tmp_path / "none.png")])


def test_turns_errors_and_time_limits(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.json", {"head": 1}, time.monotonic() + 60)
    order: list[str] = []

    def good(name: str) -> dict[str, float]:
        order.append(name)
        return {"x": float(len(order))}

    def bad() -> dict[str, float]:
        order.append("bad")
        raise ValueError("no")

    calls = {"a": lambda: good("a"), "bad": bad, "b": lambda: good("b")}
    keys = {name: {"part": "p", "name": name} for name in calls}
    take_turns(recorder, keys, calls, 2, {name: {"about": name} for name in calls})
    assert order == ["a", "bad", "b", "a", "b", "a", "b"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["a"] == {"part": "p", "name": "a", "ms": {"x": 5.0}, "n": 2, "ms_all": {"x": [4.0, 6.0]}, "about": "a"}
    assert rows["bad"]["error"] == "ValueError: no" and "raise ValueError" in rows["bad"]["traceback"]
    assert str(ROOT) not in rows["bad"]["traceback"] and "experiments/bench/recorder.py" in rows["bad"]["traceback"]

    recorder.deadline = time.monotonic() + 0.2
    assert recorder.measure({"name": "slow"}, lambda: time.sleep(30)) is None
    assert recorder.measure({"name": "late"}, lambda: 1) is None
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["slow"]["error"].startswith("OutOfTime") and rows["late"]["skipped"] == "no time left"


def test_a_turn_that_is_stopped_leaves_what_was_measured(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.json", {}, time.monotonic() + 60)
    turns = iter([1.0, 2.0, 3.0])

    def slower() -> dict[str, float]:
        ms = next(turns, None)
        if ms is None:
            raise MemoryError("no room")
        return {"x": ms}

    take_turns(recorder, {"a": {"part": "p", "name": "a"}}, {"a": slower}, 5, {"a": {"about": 1}})
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["ms_all"] == {"x": [2.0, 3.0]} and row["n"] == 2 and row["about"] == 1 and "error" not in row
    assert row["later_turn"] == "MemoryError: no room"


def test_result_files_name_no_folder_of_the_machine(rehearsed: dict[str, Any]) -> None:
    assert short(f'File "{ROOT}/shirg/taps.py", line 2') == 'File "shirg/taps.py", line 2'
    assert short("--out /data/me/out/gpu/llada.json --lm llada") == "--out gpu/llada.json --lm llada"
    assert short("--pictures /a/b/c.png,/a/d/e.png") == "--pictures b/c.png,d/e.png"
    assert short("3 samples/s, a / b, docs/results/gpu") == "3 samples/s, a / b, docs/results/gpu"
    command = rehearsed["command"].split()
    assert command[:3] == ["python", "-m", "experiments.bench.true_size"]
    assert command[command.index("--out") + 1].count("/") == 1


def test_a_process_that_hangs_is_stopped() -> None:
    assert gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.3) is None
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3


def test_the_files_with_gpu_tests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    every = gpu.test_files()
    assert "tests/lavida_adapter/test_captured_steps.py" in every and "tests/experiments/test_profiling.py" in every
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    fewer = gpu.test_files()
    assert fewer == [path for path in every if not path.startswith("tests/experiments")]
    assert "tests/experiments/test_profiling.py" in capsys.readouterr().out


def test_the_work_of_the_tower_is_that_of_its_matrix_products() -> None:
    config = toy("llada")
    tower = random_model(config, CPU, torch.float32).model.vision_tower
    views = torch.zeros(3, 3, 64, 64)
    counted = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * inputs[0].shape[-1]

    for module in tower.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    tower(views)
    n, d, layers = 64, 16, 2
    counted += 3 * (2 * n * d * 3 * 8 * 8 + layers * 4 * n * n * d)  # patch embedding, attention
    assert tower_work(config, 3, 4).flops == counted
    assert published("llada").budgets["base"] == 980 and published("dream").lm.d_model == 3584


def test_a_time_is_the_mean_of_calls_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5])
    monkeypatch.setattr("experiments.bench.recorder.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls: list[int] = []
    assert time_ms(lambda: calls.append(1), CPU, 5) == 100.0
    assert len(calls) == 5


@pytest.mark.parametrize("lm", ["llada", "dream"])
def test_the_captured_step_is_rehearsed_too(lm: str, tmp_path: Path) -> None:
    """Without a graph, as everywhere on a CPU; its logits are those of the eager engine."""
    file = tmp_path / "steps.json"
    words = ["--size", "toy", "--device", "cpu", "--dtype", "float32", "--rounds", "1", "--batch", "2", "--lm", lm]
    main(["--out", str(file), *words, "--parts", "steps", "--engines", "eager,graph", "--commit", "abc"])
    rows = json.loads(file.read_text())["rows"]
    assert [row["engine"] for row in rows if row["part"] == "steps"] == ["eager", "graph"]
    apart = {row["engine"]: row for row in rows if row["part"] == "agreement"}
    assert apart["graph"]["relative_error"] < 1e-5 and apart["graph"]["same_token"] == 1
