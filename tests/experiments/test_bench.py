"""The bench at a toy size: everything that is not a duration; and that the naive twin does what the gate does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import __main__ as command
from experiments.bench import reference, selectors
from experiments.bench.common import time_call
from experiments.schema import CONF
from lavida_adapter import LavidaConfig, LladaConfig, VisionConfig
from shirg import ShirgSelector
from tests.experiments.conftest import ROOT
from tests.features import SIZES, make_features

CPU = torch.device("cpu")
TOY = LavidaConfig(
    vision=VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    ),
    lm=LladaConfig(d_model=24, n_heads=2, n_kv_heads=2, n_layers=1, mlp_hidden_size=32),
    image_grid_pinpoints=((128, 128),),
)


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_the_naive_twin_equals_the_gate(grid: tuple[int, int]) -> None:
    features = make_features(grid, side=9, sizes=SIZES[grid][:2], seed=4)
    chosen = ShirgSelector(budget=70, scaffold={"size": 5})(features)
    for sample in range(2):
        tokens, kept = reference.naive_shirg980(features, sample, 70, scaffold=5)
        assert kept == chosen.index_BT[sample, 25:].tolist()
        assert torch.allclose(tokens, chosen.tokens_BTD[sample], atol=1e-5)


def test_every_selector_is_timed_beside_the_twin_and_the_tower() -> None:
    names = selectors.everything()
    assert {path.stem for path in (CONF / "selector").glob("*.yaml")} < set(names) and "topv scope=global" in names
    measured = selectors.bench(TOY, names, CPU, torch.float32, [1, 2], repeats=3)
    assert [(row.selector, row.batch) for row in measured.rows] == [(name, b) for b in (1, 2) for name in names]
    tokens = {row.selector: row.tokens for row in measured.rows}
    assert tokens["shirg"] == tokens["saint"] == (320, TOY.budgets["base"])
    # A canvas of 7/4 of a view in one view, and two views of 7/6 of it.
    assert (tokens["shirg_672"][0], tokens["shirg_fovea"][0]) == (14**2, 2 * 9**2)
    report = measured.report()
    assert set(report["encode"]) == {"lavida_tiles", "single_672", "fovea"}
    for row in report["selectors"]:
        assert len(row["ms_all"]) == 3 and row["ms"] == sorted(row["ms_all"])[1] and row["ms_min"] == min(row["ms_all"])
        assert row["ms_per_picture"] == row["ms"] / row["batch"]
        assert row["times_faster_than_naive"] == report["naive"]["ms"] / row["ms_per_picture"]
        assert row["share_of_encode"] == row["ms_per_picture"] / report["encode"][row["geometry"]]["ms_min"]
    lines = measured.lines()
    assert len(lines) == 1 + 1 + 3 + len(measured.rows) and len({len(line) for line in lines}) == 1


def test_the_clock_counts_what_it_says() -> None:
    calls: list[int] = []
    timing = time_call(lambda: calls.append(1), CPU, repeats=5, warm_up=2)
    assert len(calls) == 7 and len(timing.wall_ms) == len(timing.cpu_ms) == 5
    assert timing.least <= timing.median


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["selectors", "--only", "foo"], "selector=foo: there is no such option; choose from "),
        (["selectors", "--batch", "0,x"], "argument --batch: '0' is not a whole number from 1 on"),
        (["selectors", "--threads", "0"], "argument --threads: '0' is not a whole number from 1 on"),
        (["selectors", "--dtype", "int8"], "argument --dtype: 'int8' is not float32, bfloat16 or float16"),
        (["selectors", "--device", "abacus"], "device=abacus: give auto, cpu"),
        (["decoders"], "invalid choice: 'decoders'"),
        ([], "the following arguments are required: PART"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "LavidaConfig", lambda: TOY)
    given = ["--only", "random,shirg", "--batch", "1", "--threads", "1", "--out", str(tmp_path / "b.json")]
    command.main(["selectors", *given])
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["command"].startswith("python -m experiments.bench selectors --only random,shirg")
    assert written["environment"]["threads"] == 1 and written["environment"]["device"] == "cpu"
    assert {"git", "torch", "python", "dtype"} <= written["environment"].keys()
    assert [row["selector"] for row in written["selectors"]] == ["random", "shirg"]


@pytest.mark.parametrize("part", [[], *([name] for name in command.PARTS)])
def test_help_is_quick(part: list[str]) -> None:
    line = [sys.executable, "-X", "importtime", "-m", "experiments.bench", *part, "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ("--threads" if part else "selectors") in done.stdout
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
