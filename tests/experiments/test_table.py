"""The study's table: what it says of jobs that are right, limited, dead; how it pairs them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiments.analysis.aggregate import summarise
from experiments.analysis.columns import columns, legend, markdown, parts
from experiments.analysis.rows import collect
from experiments.analysis.stats import paired_delta
from experiments.analysis.table import print_table, refresh
from experiments.jobs.results import Score, read_scores, write_samples
from tests.experiments.conftest import result_of

Eval = Callable[..., Path]


def row(i: int, score: float, **fields: Any) -> dict[str, Any]:
    base = {
        "id": f"s{i}",
        "picture": f"p{i // 2}",
        "question": "?",
        "prompt": "?",
        "answers": ["a"],
        "prediction": "a",
        "scores": {"exact_match": score},
        "subtask": "digit",
        "group": "fine",
        "density": "sparse",
        "n_visual": 80,
        "n_prefix": 100,
        "n_cache": None,
        "n_steps": 3,
        "cache_bytes": 2048.0,
        "drift": None,
        "same_top1": None,
        "kept": [1, 2],
        "sources": {"kept": 64, "scaffold": 16},
        "recall": None,
        "batch": 0,
        "ms": {"select": 0.5},
    }
    return base | fields


def test_summary_counts_by_group_and_density() -> None:
    rows = [
        *(row(i, 1.0, density="dense", recall=0.5) for i in range(4)),
        *(row(i, i % 2, recall=1.0) for i in range(4, 8)),
        *(row(i, 0.0, group="guard", subtask="shape", n_visual=90) for i in range(8, 10)),
    ]
    got = summarise(rows, ("exact_match",))
    assert list(got["quality"]["subsets"]) == ["fine dense", "fine sparse", "guard sparse"]
    assert [v["mean"] for v in got["quality"]["subsets"].values()] == [1.0, 0.5, 0.0]
    assert [v["n"] for v in got["quality"]["subsets"].values()] == [4, 4, 2]
    assert got["quality"]["metrics"]["exact_match"]["mean"] == 0.6
    assert got["quality"]["subtasks"]["shape"]["n"] == 2
    assert got["quality"]["recall"]["mean"] == 0.75 and got["quality"]["recall"]["n"] == 8
    assert got["quality"]["recall_subsets"]["guard sparse"] is None
    assert got["tokens"]["visual"] == {"mean": 82.0, "min": 80, "max": 90}
    assert got["tokens"]["by_source"] == {"kept": 64.0, "scaffold": 16.0}


def test_samples_without_a_score_are_left_out_and_kept_in_the_file(tmp_path: Path) -> None:
    rows = [row(0, 1.0), row(1, 0.0) | {"scores": {"exact_match": None}}]
    assert summarise(rows, ("exact_match",))["quality"]["metrics"]["exact_match"]["n"] == 1
    write_samples(tmp_path / "samples.parquet", rows)
    assert read_scores(tmp_path / "samples.parquet", "exact_match") == {"s0": Score(1.0, "p0", "fine", "sparse")}
    stored = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [r["score_exact_match"] for r in stored] == [1.0, None]
    assert stored[0]["kept"] == [1, 2] and stored[0]["n_scaffold"] == 16 and stored[0]["ms_select"] == 0.5


def test_rows_are_paired_with_the_pooled_job_on_the_same_samples(eval_here: Eval) -> None:
    """Scores are planted, because a random model is wrong everywhere."""
    jobs = {name: eval_here(f"selector={name}", "limit=30") for name in ("pooled", "shirg", "random")}
    other = eval_here("selector=shirg", "limit=20")
    for name, job in jobs.items():
        rows = pq.read_table(job / "samples.parquet").to_pylist()
        for i, sample in enumerate(rows):
            sample["scores"] = {"exact_match": float(i % 3 == 0 if name == "pooled" else i % 2 == 0)}
            sample |= {"sources": {"kept": 1}, "ms": {}}
        write_samples(job / "samples.parquet", rows)
    study = jobs["pooled"].parent
    got = {r["job"]: r for r in collect(study)}
    want = paired_delta({str(i): float(i % 2 == 0) for i in range(30)}, {str(i): float(i % 3 == 0) for i in range(30)})
    assert want is not None
    assert got[jobs["shirg"].name]["delta vs pooled mean"] == pytest.approx(want.mean) == pytest.approx(5 / 30)
    assert not any(key.startswith("delta") for key in got[jobs["pooled"].name])
    assert not any(key.startswith("delta") for key in got[other.name]), "other samples are no pair"
    titles = [c.title for c in columns(collect(study))]
    assert "fine vs pooled" in titles and "guard vs pooled" in titles and "vs pooled" not in titles
    rows = pq.read_table(jobs["pooled"] / "samples.parquet").to_pylist()
    fine = [i for i, sample in enumerate(rows) if sample["group"] == "fine"]
    mean = sum((i % 2 == 0) - (i % 3 == 0) for i in fine) / len(fine)
    assert got[jobs["random"].name]["delta fine vs pooled mean"] == pytest.approx(mean)
    assert [r["selector"] for r in collect(study)][0] == "pooled"


def test_the_table_has_a_row_for_every_job_and_says_what_limits_it(eval_here: Eval) -> None:
    eval_here("selector=pooled", "limit=12")
    eval_here("selector=random", "limit=12", "budget=999", ok=False)
    job = eval_here("selector=full", "data.n=24")
    study = job.parent
    rows = {r["selector"]: r for r in collect(study)}
    assert rows["full"]["visual tokens min"] == rows["full"]["visual tokens max"] == 336
    assert rows["full"]["prefix tokens mean"] - 336 == rows["pooled"]["prefix tokens mean"] - 88 > 0
    assert rows["full"]["note"] == "untrained model"
    assert rows["pooled"]["note"] == "untrained model; limited to 12 samples"
    assert rows["random"]["status"] == "failed" and "budget 999 is larger" in rows["random"]["reason"]
    text = (study / "table.md").read_text()
    assert text == markdown(refresh(study))
    lines = text.splitlines()
    firsts = [line.split(" | ")[0] for line in lines if line.startswith("|")]
    assert firsts == ["| selector", "| ---", "| full", "| selector", "| ---", "| pooled", "| random"]
    assert "-" == next(c for c in columns(collect(study)) if c.title == "recall").texts[1]
    flat = list(csv.DictReader((study / "table.csv").read_text().splitlines()))
    assert len(flat) == 3 == pq.read_table(study / "table.parquet").num_rows
    assert {r["version"] for r in flat} == {"2"}
    assert float(flat[0]["select ms"]) > 0 and flat[2]["select ms"] == ""


def test_a_job_that_died_is_not_called_running(eval_here: Eval) -> None:
    job = eval_here("selector=pooled", "limit=4")
    result = result_of(job)
    (job / "result.json").write_text(json.dumps(result | {"status": "running"}))
    assert [r["status"] for r in collect(job.parent)] == ["stopped"]


def test_what_all_rows_share_is_said_once(eval_here: Eval) -> None:
    eval_here("selector=pooled", "limit=6", "decode.step_ratio=0.7")
    study = eval_here("selector=random", "limit=6", "decode.step_ratio=0.7").parent
    assert "changes" not in [c.title for c in columns(collect(study))]
    assert "decode.step_ratio=0.7" in (study / "table.md").read_text().splitlines()[-1]
    eval_here("selector=random", "limit=6")
    shown = {c.title: c.texts for c in columns(collect(study))}
    assert sum("decode.step_ratio=0.7" in cell for cell in shown["changes"]) == 2


def test_a_part_of_the_rows_says_what_the_legend_does_not(eval_here: Eval) -> None:
    eval_here("selector=pooled", "data.n=12", "decode.step_ratio=0.7", "batch_size=4")
    eval_here("selector=random", "data.n=12", "batch_size=4")
    study = eval_here("selector=pooled", "data.n=12", "limit=6", "batch_size=4").parent
    rows = collect(study)
    whole, limited = (part for _, part in parts(rows))
    shown = [{c.title: c.texts for c in columns(part, rows)} for part in (whole, limited)]
    assert [text for text in shown[0]["changes"] if text] == ["decode.step_ratio=0.7"]
    assert "batch_size=4" not in str(shown) and "batch_size=4" in legend(rows)
    assert {c.title: c.texts for c in columns(whole)}.get("changes") == shown[0]["changes"]


def test_lists_on_the_terminal_are_no_markup(eval_here: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    eval_here("selector=pooled", "limit=6", "data.density=[sparse,dense]")
    study = eval_here("selector=pooled", "limit=6").parent
    capsys.readouterr()
    print_table(study)
    assert "data.density=[sparse,dense]" in capsys.readouterr().out


def test_why_every_job_failed_is_in_the_table(eval_here: Eval) -> None:
    for selector in ("random", "shirg"):
        study = eval_here(f"selector={selector}", "model.path=./weights/absent", ok=False).parent
    text = (study / "table.md").read_text()
    assert text.count("model.path=./weights/absent: there are no weights there") == 2
