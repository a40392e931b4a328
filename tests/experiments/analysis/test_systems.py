"""Jobs that differ in the seed alone: what draws is another observation, what does not is the same one again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.analysis.columns import columns
from experiments.analysis.systems import base_config, conflicts
from experiments.analysis.table import collect, markdown
from tests.experiments.conftest import result_of, rows_of
from tests.experiments.planting import change_result

Eval = Callable[..., Path]
WORDS = ("data.n=12", "study=s", "shots=0")


def test_the_seed_reaches_the_selector(eval_here: Eval) -> None:
    jobs = [eval_here("selector=random", f"seed={seed}", *WORDS) for seed in (0, 1)]
    kept = [[row["kept"] for row in rows_of(job)] for job in jobs]
    assert all(one != other for one, other in zip(*kept, strict=True))
    assert [result_of(job)["config"]["selector"]["seed"] for job in jobs] == [0, 1]
    fixed = eval_here("selector=random", "seed=1", "selector.seed=0", *WORDS)
    assert [row["kept"] for row in rows_of(fixed)] == kept[0]
    rows = {row["job"]: row for row in collect(fixed.parent)}
    assert rows[jobs[0].name]["seeds"] == "0 1" and not rows[jobs[0].name]["seeds equal"]
    assert rows[fixed.name]["seeds"] == "1", "a seed that is given is a setting"


def test_seeds_of_a_system_that_draws_nothing_count_once(eval_here: Eval) -> None:
    jobs = [eval_here("selector=pooled", f"seed={seed}", *WORDS) for seed in (0, 1, 2)]
    single = eval_here("selector=uniform_grid", *WORDS)
    rows = {row["job"]: row for row in collect(single.parent)}
    row = rows[jobs[0].name]
    score = result_of(jobs[0])["quality"]["metrics"]["exact_match"]
    assert (row["exact_match low"], row["exact_match high"]) == (score["low"], score["high"])
    assert "exact_match between" not in row and row["jobs"].split() == [job.name for job in jobs]
    assert "delta vs pooled seeds" not in rows[single.name] and "delta vs pooled p" in rows[single.name]
    shown = {column.title: column.texts for column in columns(list(rows.values()))}
    assert sorted(shown["seeds"]) == ["-", "3 equal"]
    text = markdown(list(rows.values()))
    assert "every seed gives the same answers" in text and "new seed" not in text


def test_equal_answers_of_other_weights_are_observations(eval_here: Eval) -> None:
    jobs = [eval_here("selector=pooled", f"seed={seed}", *WORDS) for seed in (0, 1)]
    change_result(jobs[1], model=result_of(jobs[1])["model"] | {"weights": "other"})
    (row,) = collect(jobs[0].parent)
    assert not row["seeds equal"] and row["exact_match between"] == 0.0


def test_seeds_on_other_data_stay_apart(eval_here: Eval) -> None:
    jobs = [eval_here("selector=random", f"seed={seed}", *WORDS) for seed in (0, 1)]
    data = result_of(jobs[1])["data"]
    for kind in ("texts", "pictures"):
        change_result(jobs[1], data=data | {"digests": data["digests"] | {kind: "0" * 16}})
        assert len(collect(jobs[0].parent)) == 2
    change_result(jobs[1], data={key: value for key, value in data.items() if key != "digests"})
    assert len(collect(jobs[0].parent)) == 1, "a record from before digests: they are those of its samples"


def test_seeds_that_drew_other_samples_are_named(eval_here: Eval) -> None:
    for words in (*([f"seed={seed}", "limit=6"] for seed in (0, 1)), ["seed=2"]):
        study = eval_here("selector=pooled", *words, *WORDS).parent
    rows = collect(study)
    shown = {column.title: column.texts for column in columns(rows)}
    assert sorted(zip(shown["changes"], shown["n"], strict=True)) == [
        ("", "12"),
        ("seed=0", "6 of 12"),
        ("seed=1", "6 of 12"),
    ]
    assert len({row["ids"] for row in rows}) == 3


def test_a_record_of_an_older_study_has_the_system_of_today() -> None:
    """There, `seed` did not reach the selector."""

    def config(seed: int, selector: int, *overrides: str) -> dict[str, object]:
        options = {"seed": seed, "model": {"path": "m"}, "adapter": None, "selector": {"seed": selector}}
        return base_config({"config": options, "overrides": [f"seed={seed}", *overrides]})

    assert config(0, 0) == config(1, 0) == config(2, 2)
    assert config(0, 0) != config(1, 0, "++selector.seed=0")


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ({"texts": "a", "pictures": "b"}, {"texts": "a", "pictures": "c"}, ["pictures"]),
        ({"texts": "a", "pictures": "b"}, {"texts": "a", "pictures": None}, []),
        ({"texts": "a"}, {"texts": "b", "pictures": "c"}, ["texts"]),
    ],
)
def test_what_one_of_two_does_not_know_is_no_conflict(
    ours: dict[str, str | None], theirs: dict[str, str | None], found: list[str]
) -> None:
    assert conflicts(ours, theirs) == conflicts(theirs, ours) == found
