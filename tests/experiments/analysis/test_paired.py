"""What a row is compared to, over which family of tests, and whether at an equal budget."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.analysis.columns import columns, of_full
from experiments.analysis.paired import budget_ratio, shares
from experiments.analysis.rows import unequal
from experiments.analysis.stats import holm, paired_delta
from experiments.analysis.table import collect, markdown
from experiments.compare import compare, table_of
from experiments.jobs.sample_rows import read_rows
from tests.experiments.conftest import result_of
from tests.experiments.planting import change_result, plant

Eval = Callable[..., Path]


def test_rows_are_paired_with_the_pooled_job_on_the_same_samples(eval_here: Eval) -> None:
    jobs = {name: eval_here(f"selector={name}", "limit=30") for name in ("pooled", "shirg", "random")}
    other = eval_here("selector=shirg", "limit=20")
    for name, job in jobs.items():
        plant(job, lambda i, every=3 if name == "pooled" else 2: i % every == 0)
    study = jobs["pooled"].parent
    got = {r["job"]: r for r in collect(study)}
    want = paired_delta({str(i): float(i % 2 == 0) for i in range(30)}, {str(i): float(i % 3 == 0) for i in range(30)})
    assert want is not None
    assert got[jobs["shirg"].name]["delta vs pooled mean"] == pytest.approx(want.mean) == pytest.approx(5 / 30)
    assert not any(key.startswith("delta") for key in got[jobs["pooled"].name])
    assert not any(key.startswith("delta") for key in got[other.name]), "other samples are no pair"
    titles = [c.title for c in columns(collect(study))]
    assert "fine vs pooled" in titles and "guard vs pooled" in titles and "vs pooled" not in titles
    rows = read_rows(jobs["pooled"] / "samples.parquet")
    fine = [i for i, sample in enumerate(rows) if sample["group"] == "fine"]
    mean = sum((i % 2 == 0) - (i % 3 == 0) for i in fine) / len(fine)
    assert got[jobs["random"].name]["delta fine vs pooled mean"] == pytest.approx(mean)
    assert [r["selector"] for r in collect(study)][0] == "pooled"


def test_p_values_are_adjusted_over_the_systems_of_one_comparison(eval_here: Eval) -> None:
    right = {"pooled": 2, "random": 3, "full": 5, "uniform_grid": 2}
    for selector, eighths in right.items():
        job = eval_here(f"selector={selector}", "data.n=48")
        plant(job, lambda i, eighths=eighths: i % 8 < eighths)
    rows = {row["selector"]: row for row in collect(job.parent)}
    assert "delta vs pooled p" not in rows["pooled"]
    names = ["random", "full", "uniform_grid"]
    wanted = holm([rows[name]["delta vs pooled p"] for name in names])
    assert [rows[name]["delta vs pooled p holm"] for name in names] == wanted
    assert rows["full"]["delta vs pooled wins"] == 18 and rows["full"]["delta vs pooled losses"] == 0
    assert rows["uniform_grid"]["delta vs pooled p"] == 1.0
    assert rows["full"]["delta vs pooled p holm"] > rows["full"]["delta vs pooled p"]
    text = markdown(list(rows.values()))
    assert "Detectable at this n with 80 % power" in text and "]* |" in text


def test_another_training_of_the_base_is_no_partner(eval_here: Eval) -> None:
    """Of a base with one training and a system with three, the same training alone is paired."""
    jobs = [
        eval_here(f"selector={name}", f"seed={seed}", "data.n=24", "data.seed=0")
        for name, seed in (("pooled", 0), ("random", 0), ("random", 1), ("random", 2))
    ]
    for i, job in enumerate(jobs):
        plant(job, lambda sample, i=i: sample % 4 < i)
    same = {r["selector"]: r for r in collect(jobs[0].parent)}["random"]
    assert same["delta vs pooled seeds"] == 3 and same["delta vs pooled mean"] == pytest.approx(0.5)
    for seed, job in ((1, jobs[2]), (2, jobs[3])):
        change_result(job, model=result_of(job)["model"] | {"weights": f"training {seed}"})
    other = {r["selector"]: r for r in collect(jobs[0].parent)}["random"]
    assert "delta vs pooled seeds" not in other and other["delta vs pooled mean"] == pytest.approx(0.25)


def test_an_ablation_is_compared_to_the_whole_method(eval_here: Eval) -> None:
    whole = eval_here("selector=shirg", "data.n=24")
    less = eval_here("selector=shirg", "data.n=24", "ablation=sign_flip")
    eval_here("selector=pooled", "data.n=24")
    plant(whole, lambda i: i % 2 == 0)
    plant(less, lambda i: i % 4 == 0)
    rows = {row["job"]: row for row in collect(whole.parent)}
    assert rows[less.name]["compared to unablated"] == whole.name
    assert rows[less.name]["delta vs unablated mean"] == pytest.approx(-0.25)
    assert not any("unablated" in key for key in rows[whole.name])
    assert rows[less.name]["changes"].endswith(" ablation=sign_flip")
    titles = [column.title for column in columns(list(rows.values()))]
    assert "fine vs unablated" in titles and "fine vs pooled" in titles


def test_a_baseline_keeps_its_place(eval_here: Eval) -> None:
    """A variant of the baseline comes first in the order of names, and is added later."""
    words = ("data.n=24", "study=s", "shots=0")
    plain, random = eval_here("selector=pooled", *words), eval_here("selector=random", *words)
    variant = eval_here("selector=pooled", "batch_size=8", *words)
    assert variant.name < plain.name
    rows = {row["job"]: row for row in collect(plain.parent)}
    assert rows[random.name]["compared to pooled"] == rows[variant.name]["compared to pooled"] == plain.name
    assert "compared to pooled" not in rows[plain.name]
    assert f"pooled is {plain.name}." in markdown(list(rows.values()))
    texts = table_of(compare([plain.parent], "selector", "pooled"), "selector")
    assert texts["seeds"].to_list() == ["1", "1", "1"] and texts["fine, against pooled"][0] == "-"
    assert texts["system"][0] == "pooled"


@pytest.mark.parametrize("answer", ["one", "two"])
def test_other_data_is_no_pair(answer: str, picture_folder: Callable[..., Path], eval_here: Eval) -> None:
    """Labels that were corrected between two jobs, under the same ids."""
    data = picture_folder("data", ["what?", "why?"])
    words = ("data=folder", f"data.root={data}", "study=s", "shots=0")
    pooled = eval_here("selector=pooled", *words)
    lines = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(lines.replace('["one"]', f'["{answer}"]', 1))
    other = eval_here("selector=random", *words)
    row = {row["job"]: row for row in collect(pooled.parent)}[other.name]
    assert ("delta vs pooled mean" in row) is (answer == "one")
    told = f"not compared to {pooled.name}, whose data was other: 0.png#0 has another answers"
    assert (told in row["note"]) is (answer == "two")


@pytest.mark.parametrize(
    ("fields", "ratio"),
    [
        ({"visual tokens mean": 80.0}, 1.0),  # as many as pooled has without newlines
        ({"visual tokens mean": 88.0}, 1.0),  # as many as pooled has with them
        ({"visual tokens mean": 336.0, "newline tokens": 16.0}, 336 / 88),
        ({"visual tokens mean": 336.0, "cache tokens mean": 80.0}, 1.0),
        ({"visual tokens mean": 336.0, "cache tokens mean": 40.0}, 40 / 80),
        ({}, None),
    ],
)
def test_a_budget_is_equal_with_or_without_newlines(fields: dict[str, float], ratio: float | None) -> None:
    pooled = {"selector": "pooled", "job": "p", "visual tokens mean": 88.0, "newline tokens": 8.0}
    row = {"selector": "shirg", "job": "s", "compared to pooled": "p", **fields}
    got = budget_ratio(row, {one["job"]: one for one in (pooled, row)})
    assert got == (None if ratio is None else pytest.approx(ratio, abs=0.1 * abs(ratio - 1)))
    assert unequal(row | {"budget ratio": got}) is (ratio not in (None, 1.0))
    assert budget_ratio({**row, "compared to pooled": "absent"}, {pooled["job"]: pooled}) is None


def test_what_is_left_of_the_score_with_all_tokens() -> None:
    whole = {"ids": "a", "metric": "m", "m mean": 0.8, "group fine mean": 0.5, "group guard mean": 0.0}
    row = {"ids": "a", "metric": "m", "m mean": 0.6, "group fine mean": 0.75, "group guard mean": 0.5}
    assert shares(row, whole) == {"of full": pytest.approx(0.75), "fine of full": 1.5}, "nothing of a score of zero"
    assert shares(row | {"ids": "b"}, whole) == {}, "other samples"
    assert of_full([shares(row, whole)]) == ["fine of full"], "by group, as the differences"
    assert of_full([{"of full": 0.75}]) == ["of full"]


def test_all_tokens_are_those_of_the_row_that_changes_least(eval_here: Eval) -> None:
    for words in (("selector=full",), ("selector=full", "batch_size=4"), ("selector=pooled",)):
        job = eval_here(*words, "limit=6", "shots=0")
        result = result_of(job)
        scores = {"mean": 0.5 if len(words) > 1 else 0.8, "low": 0.1, "high": 0.9, "n": 6}
        change_result(job, quality=result["quality"] | {"metrics": {"exact_match": scores}, "groups": {}})
    rows = {(row["selector"], row["changes"].count("batch_size")): row["of full"] for row in collect(job.parent)}
    assert rows == {("full", 0): 1.0, ("full", 1): 0.625, ("pooled", 0): 1.0}
