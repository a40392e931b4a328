"""Trainings of one system: one row, its interval, its differences; and what is not the same system."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import stdtrit

from experiments.analysis.aggregate import seed_of
from experiments.analysis.columns import columns, markdown
from experiments.analysis.rows import collect
from experiments.analysis.stats import over_seeds
from experiments.jobs.results import read_rows, write_samples
from tests.experiments.conftest import result_of

Eval = Callable[..., Path]


def test_without_spread_between_seeds_it_is_students_interval_over_pictures() -> None:
    scores = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    got = over_seeds(np.stack([scores, scores, scores]), list("abcdef"))
    half = float(stdtrit(5, 0.975)) * scores.std(ddof=1) / math.sqrt(6)
    assert (got.mean, got.seeds, got.n, got.between) == (pytest.approx(4 / 6), 3, 6, 0.0)
    assert got.high == 1.0 and got.low == pytest.approx(4 / 6 - half)


def test_without_spread_between_pictures_it_is_students_interval_over_seeds() -> None:
    means = np.array([0.2, 0.4, 0.3])
    got = over_seeds(np.repeat(means[:, None], 8, axis=1), list("abcdefgh"))
    half = float(stdtrit(2, 0.975)) * means.std(ddof=1) / math.sqrt(3)
    assert got.mean == pytest.approx(0.3) and got.between == pytest.approx(0.1)
    assert (got.low, got.high) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    # t = 0.3 / (0.1 / sqrt 3) = 5.196 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    assert got.p == pytest.approx(1 - 5.19615 / math.sqrt(29), abs=1e-5)


def test_questions_about_one_picture_are_one_observation() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.normal(size=(4, 1, 30)) + 0.1 * generator.normal(size=(4, 3, 30))
    alone = over_seeds(pictures.mean(axis=1), list(range(30)), -9.0)
    repeated = over_seeds(pictures.reshape(4, -1), list(range(30)) * 3, -9.0)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def test_where_nothing_varies_it_is_not_certain() -> None:
    got = over_seeds(np.ones((3, 40)), list(range(40)), 0.0)
    assert (got.mean, got.high, got.p) == (1.0, 1.0, 0.0)
    assert got.low == pytest.approx(1 - 3.8414588 / 43.8414588)
    with pytest.raises(ValueError, match="1 seeds on 4 pictures"):
        over_seeds(np.ones((1, 4)), list(range(4)))


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


def plant(job: Path, right: Callable[[int], bool], **changes: Any) -> None:
    """Scores of our own making in a finished job; a random model is wrong everywhere."""
    rows = read_rows(job / "samples.parquet")
    for i, row in enumerate(rows):
        row["scores"] = {"exact_match": float(right(i))}
    write_samples(job / "samples.parquet", rows)
    (job / "result.json").write_text(json.dumps(result_of(job) | changes))


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
