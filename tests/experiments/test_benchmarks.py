"""Each benchmark from each source through eval.py, eight samples at a time; and what a part of a set may be beside."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.analysis.table import collect, markdown, read_table
from experiments.analysis.terminal_table import print_table
from experiments.data.synthetic.entitygrid.__main__ import main as export
from tests.data import official
from tests.experiments.conftest import result_of

Eval = Callable[..., Path]
FEW = ("limit=8", "selector=pooled", "shots=0", "decode.max_new_tokens=4")
GRID = ("data.canvas=[128,128]", "data.entities=4", "data.sizes=[16]")


@pytest.mark.parametrize("source", official.SOURCES)
@pytest.mark.parametrize("name", official.BENCHMARKS)
def test_eight_samples(eval_here: Eval, tmp_path: Path, name: str, source: str) -> None:
    job = eval_here(*official.write(name, source, tmp_path / source), *FEW)
    result = result_of(job)
    data = result["data"]
    assert (data["name"], data["split"], data["n"], data["of"]) == (name, official.split_of(name), 8, official.N)
    assert data["found"]["source"] == source and len(data["prompt"]) == len(data["ids"]) == 16
    quality = result["quality"]
    asked = result["config"]["data"]["metrics"]
    assert quality["metric"] == asked[0]
    assert list(quality["metrics"]) == asked and all(quality["metrics"].values())
    (row,) = collect(job.parent)
    assert row["limited"] and row["ids"] == data["ids"] and row["prompt"] == data["prompt"]
    samples = pq.read_table(job / "samples.parquet").to_pylist()
    assert all(
        sample["prompt"].startswith("What is ") and "\nAnswer the question" in sample["prompt"] for sample in samples
    )


def test_eight_samples_of_the_probe_from_each_source(eval_here: Eval, tmp_path: Path) -> None:
    root = tmp_path / "probe"
    knobs = [override.removeprefix("data.") for override in GRID]
    export([str(root), "split=val", *knobs])
    with pytest.raises(SystemExit):  # nothing is written over
        export([str(root), "split=val", *knobs])
    parquet = tmp_path / "repository"
    rows = [json.loads(line) for line in (root / "val" / "metadata.jsonl").read_text().splitlines()]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "file_name"}
    columns["image"] = [str(root / "val" / row["file_name"]) for row in rows]
    columns["picture"] = [row["file_name"] for row in rows]
    official.hub("entitygrid", parquet, "val", len(rows), columns)
    sources = {
        "generate": GRID,
        "disk": (f"data.root={root}",),
        "folder": (f"data.root={root}",),
        "hub": (f"data.hub={parquet}",),
    }
    results = []
    for source, overrides in sources.items():
        job = eval_here("data=entitygrid", f"data.source={source}", "data.split=val", *overrides, *FEW)
        results.append(result_of(job))
        assert results[-1]["data"]["name"] == "synth_entitygrid"
        assert results[-1]["data"]["found"]["source"] == source
    # The same questions about the same pixels, whichever way they came.
    assert len({result["data"]["ids"] for result in results}) == 1
    assert len({json.dumps(result["quality"]) for result in results}) == 1


def test_the_probe_reports_what_cuts_cost(eval_here: Eval) -> None:
    job = eval_here("data=entitygrid", *GRID, "selector=random", "shots=0", "decode.max_new_tokens=4")
    probe = result_of(job)["quality"]["probe"]
    assert (
        set(probe["accuracy"]["all"])
        == set(probe["recall"])
        == set(probe["overcount"])
        == {"centre", "edge", "junction"}
    )
    assert set(probe["disc1"]) == {"all", "identification", "choice", "position", "counting"} == set(probe["disc2"])
    assert probe["disc1"]["all"]["n"] == 4
    table = (job.parent / "table.md").read_text()
    header = table.splitlines()[0]
    assert all(f" {name} " in header for name in ("identification", "counting", "disc1", "disc2", "recall", "token_f1"))


def test_parts_and_wholes_are_never_in_one_table(
    eval_here: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = official.write("chartqa", "disk", tmp_path / "charts")
    few = FEW[1:]
    study = eval_here(*read, *few).parent
    eval_here(*read, *few, "selector=full")
    eval_here(*read, *few, "limit=8")
    eval_here(*read, *few, "limit=99")
    rows = collect(study)
    assert [row["limited"] for row in rows] == [False, False, False, True]
    assert [row["n"] for row in rows] == [12, 12, 12, 8]
    whole, _, part = markdown(rows).partition("Limited to a part of the samples, not comparable with whole sets:")
    assert whole.count("\n| pooled ") == 2 and whole.count("\n| full ") == 1 and "8 of 12" not in whole
    assert part.count("\n| pooled ") == 1 and " 8 of 12 |" in part
    for title in ("relaxed_accuracy", "relaxed_accuracy_clean", "cider_d", "human", "augmented"):
        assert f" {title} |" in whole.splitlines()[0]
    assert len({row["ids"] for row in rows}) == 2
    assert whole.count(" of 500.0 |") == 3 * 2, "the ceiling stands beside both scores of every whole row"
    capsys.readouterr()
    print_table(read_table(study), study)
    assert "Limited to a part of the samples" in capsys.readouterr().out
    flat = list(csv.DictReader((study / "table.csv").read_text().splitlines()))
    assert [row["limited"] for row in flat] == ["False", "False", "False", "True"]
    assert float(flat[0]["cider_d ceiling"]) > 2.5 and flat[0]["cider_d tokeniser"] == "plain/1"


def test_a_smaller_limit_is_a_part_of_a_larger_one_and_the_order_of_files_does_not_matter(
    eval_here: Eval, tmp_path: Path
) -> None:
    def ids(limit: int) -> list[str]:
        job = eval_here(
            *official.write("docvqa", "disk", tmp_path / "pages"), *FEW[1:], f"limit={limit}", "overwrite=true"
        )
        return pq.read_table(job / "samples.parquet")["id"].to_pylist()

    three, eight = ids(3), ids(8)
    assert set(three) < set(eight) and eight == sorted(eight)
    file = tmp_path / "pages" / "val" / "val_v1.0_withQT.json"
    content = json.loads(file.read_text())
    content["data"].reverse()
    shuffled = tmp_path / "shuffled"
    official.write("docvqa", "disk", shuffled)
    (shuffled / "val" / "val_v1.0_withQT.json").write_text(json.dumps(content))
    job = eval_here("data=docvqa", "data.source=disk", f"data.root={shuffled}", *FEW[1:], "limit=3")
    assert set(pq.read_table(job / "samples.parquet")["id"].to_pylist()) == set(three)
