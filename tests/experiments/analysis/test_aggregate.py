"""From samples to a job's numbers, and from jobs that differ in the seed alone to one row."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.analysis.aggregate import score_corpora, summarise
from experiments.analysis.columns import columns
from experiments.analysis.systems import seed_of
from experiments.analysis.table import collect, markdown
from experiments.atomic_files import replacing
from experiments.jobs.sample_rows import SampleColumns, SampleRow, Score, read_rows, read_scores, table_of, write_tables
from experiments.metrics.answers import text_metrics
from tests.experiments.analysis import plain_summary
from tests.experiments.planting import plant

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


def summary(path: Path, rows: list[dict[str, Any]], *metrics: str) -> dict[str, Any]:
    """The summary of rows that are written in parts of three."""
    parts = [table_of(cast(list[SampleRow], rows[i : i + 3])) for i in range(0, len(rows), 3)]
    tables, corpora = score_corpora(parts, text_metrics(metrics))
    with replacing(path) as file:
        write_tables(file, tables)
    return summarise(SampleColumns(path), metrics, corpora)


def test_summary_counts_by_group_and_density(tmp_path: Path) -> None:
    rows = [
        *(row(i, 1.0, density="dense", recall=0.5) for i in range(4)),
        *(row(i, i % 2, recall=1.0) for i in range(4, 8)),
        *(row(i, 0.0, group="guard", subtask="shape", n_visual=90) for i in range(8, 10)),
    ]
    got = summary(tmp_path / "samples.parquet", rows, "exact_match")
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
    got = summary(tmp_path / "samples.parquet", rows, "exact_match")
    assert got["quality"]["metrics"]["exact_match"]["n"] == 1
    assert read_scores(tmp_path / "samples.parquet", "exact_match") == {"s0": Score(1.0, "p0", "fine", "sparse")}
    stored = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [r["score_exact_match"] for r in stored] == [1.0, None]
    assert stored[0]["kept"] == [1, 2] and stored[0]["n_scaffold"] == 16 and stored[0]["ms_select"] == 0.5


def drawn_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Rows with everything that a summary reads, some of it missing here and there."""
    rng = np.random.default_rng(seed)

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.2 else value

    def one(i: int) -> dict[str, Any]:
        words = rng.choice(["red", "blue", "two", "a red ball", "7"], 3).tolist()
        subtask = str(rng.choice(["counting", "colour", ""]))
        return row(
            i,
            0.0,
            picture=f"p{rng.integers(n // 3)}",
            answers=[str(rng.integers(3))] if subtask == "counting" else words[: rng.integers(3)],
            target="",
            prediction=str(rng.choice([words[2], "1", "2"])),
            scores={"anls": maybe(float(rng.random())), "exact_match": maybe(float(rng.integers(2))), "cider_d": None},
            subtask=subtask,
            group=str(rng.choice(["fine", "guard", ""])),
            density=str(rng.choice(["sparse", "dense"])),
            place=str(rng.choice(["centre", "edge", "junction", ""])),
            entity=f"e{rng.integers(5)}",
            n_visual=int(rng.integers(50, 90)),
            n_cache=maybe(int(rng.integers(20, 50))),
            has_final=maybe(bool(rng.integers(2))),
            cache_bytes=maybe(float(rng.random())),
            drift=maybe(float(rng.random())),
            same_top1=maybe(float(rng.random())),
            recall=maybe(float(rng.random())),
            coverage=maybe(float(rng.random())),
            gini=maybe(float(rng.random())),
            kept_map=maybe([None if rng.random() < 0.3 else float(rng.random()) for _ in range(6)]),
            sources={"kept": int(rng.integers(60)), "scaffold": 16},
        )

    return [one(i) for i in range(n)]


@pytest.mark.parametrize("n", [4, 100, 400])
def test_columns_are_summarised_as_rows_are(tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, but for the sums of kept maps, which are made in blocks."""
    monkeypatch.setattr("experiments.jobs.sample_rows.ROW_GROUP", 64)
    rows = drawn_rows(n, n)
    metrics = ("anls", "exact_match", "cider_d")
    got = summary(tmp_path / "samples.parquet", rows, *metrics)
    wanted = plain_summary.summarise(cast(list[SampleRow], rows), metrics)
    found, expected = (one["selection"].pop("position_gini") for one in (got, wanted))
    assert found == pytest.approx(expected, abs=1e-12)
    assert got == wanted
    assert [list(got["quality"][key]) for key in ("groups", "subsets", "subtasks")] == [
        list(wanted["quality"][key]) for key in ("groups", "subsets", "subtasks")
    ], "in this order"
    scores = [row["scores"]["cider_d"] for row in rows]
    assert [row["scores"]["cider_d"] for row in read_rows(tmp_path / "samples.parquet")] == scores


@pytest.mark.parametrize(
    ("path", "adapter", "seed"),
    [
        ("weights/tiny", None, "7"),
        ("outputs/e/seed-3/base", "outputs/e/seed-3/adapters/shirg", "3"),
        ("outputs/e/seed_3", "outputs/e/seed_4_shirg", "3/4"),
        ("outputs/seedling9/x", "outputs/reseed-5", "7"),
    ],
)
def test_the_seed_of_a_job_is_that_of_its_training(path: str, adapter: str | None, seed: str) -> None:
    assert seed_of({"config": {"seed": 7, "model": {"path": path}, "adapter": adapter}}) == seed


def test_jobs_that_differ_in_the_seed_alone_are_one_row(eval_here: Eval) -> None:
    data = "data.n=24"
    study = eval_here("selector=pooled", data).parent
    jobs = {seed: eval_here("selector=random", data, f"seed={seed}") for seed in (0, 1, 2)}
    for seed, job in jobs.items():
        plant(job, lambda i, seed=seed: i % 4 <= seed)  # 1/4, 2/4, 3/4 right
    failed = eval_here("selector=random", data, "seed=3", "budget=999", ok=False)
    rows = {row["job"]: row for row in collect(study)}
    assert len(rows) == 3, "pooled, random over three seeds, the failed one"
    row = rows[jobs[0].name]
    assert row["seeds"] == "0 1 2" and row["jobs"].split() == [jobs[s].name for s in (0, 1, 2)]
    assert len(row["command"].splitlines()) == 3 and row["command"].count("seed=") == 3
    assert row["exact_match mean"] == pytest.approx(0.5)
    assert row["exact_match between"] == pytest.approx(0.25)
    # 0.5 +- 4.303 x 0.25 / sqrt 3 and more: three trainings so far apart say nothing.
    assert (row["exact_match low"], row["exact_match high"]) == (0.0, 1.0)
    assert row["delta vs pooled mean"] == pytest.approx(0.5) and row["delta vs pooled seeds"] == 3
    assert row["delta vs pooled p"] > 0.05, "three seeds so far apart prove nothing"
    assert rows[failed.name]["status"] == "failed" and rows[failed.name]["seeds"] == "3"
    shown = {column.title: column.texts for column in columns(list(rows.values()))}
    assert sorted(shown["seeds"]) == ["-", "-", "3"]
    assert "± " in markdown(collect(study)) and "new seed" in markdown(collect(study))


def test_what_differs_in_more_than_the_seed_stays_apart(eval_here: Eval) -> None:
    study = eval_here("selector=random", "data.n=24", "seed=0").parent
    eval_here("selector=random", "data.n=24", "seed=1", "budget=60")
    eval_here("selector=random", "data.n=24", "limit=8", "seed=2")
    eval_here("selector=random", "data.n=24", "limit=8", "seed=4")
    rows = collect(study)
    assert len(rows) == 4, "another budget, and other samples, are no other seed"
    assert all(row["seeds"] == row["seeds"].split()[0] for row in rows)


def test_a_baseline_with_seeds_is_paired_seed_by_seed(eval_here: Eval) -> None:
    jobs: Mapping[tuple[str, int], Path] = {
        (selector, seed): eval_here(f"selector={selector}", "data.n=24", f"seed={seed}")
        for selector in ("pooled", "random")
        for seed in (0, 1, 2)
    }
    for (selector, seed), job in jobs.items():
        # Both vary together from seed to seed; the difference is one in eight in each of them.
        plant(job, lambda i, s=selector, seed=seed: i % 8 < 2 * seed + (1 if s == "random" else 0))
    row = next(row for row in collect(jobs["random", 0].parent) if row["selector"] == "random")
    assert row["delta vs pooled mean"] == pytest.approx(1 / 8) and row["delta vs pooled between"] == 0.0
    assert row["delta vs pooled high"] - row["delta vs pooled low"] < row["exact_match high"] - row["exact_match low"]
