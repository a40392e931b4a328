"""Overlap of what two systems keep: Jaccard's index by hand, its value by chance, and what is not compared."""

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import combinations, product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest

from experiments.analysis.columns import alike_cell, columns
from experiments.analysis.overlap import KeptTokens, chance_jaccard, overlap, read_kept, token_frame
from experiments.analysis.rows import Row
from experiments.analysis.systems import Result
from experiments.analysis.table import collect, markdown
from experiments.jobs.sample_rows import read_rows
from tests.experiments.conftest import result_of
from tests.experiments.planting import write_rows

Eval = Callable[..., Path]
GOLDEN = Path(__file__).parents[2] / "golden/study_format_1"
T95_OF_TWO = 4.302653
"""Student's t, 97.5 %, two degrees of freedom."""


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., KeptTokens]:
    """What a job kept, through the file; sample number i is about picture i unless `pictures` says otherwise."""
    template = read_rows(GOLDEN / "completed" / "samples.parquet")[0]

    def write(
        *tokens: Sequence[int], n_valid: int | None = 8, first: int = 0, pictures: Sequence[str] | None = None
    ) -> KeptTokens:
        names = [f"s{first + i}" for i in range(len(tokens))]
        rows = [
            template | {"id": name, "picture": picture, "kept": list(indices), "n_valid": n_valid}
            for name, picture, indices in zip(names, pictures or names, tokens, strict=True)
        ]
        write_rows(tmp_path / "samples.parquet", rows)  # type: ignore[arg-type]
        return read_kept(tmp_path / "samples.parquet")

    return write


def test_equal_sets_disjoint_sets_and_one_by_hand(kept: Callable[..., KeptTokens]) -> None:
    one = kept([0, 3, 7], [1])
    same = overlap({"0": one}, {"0": one})
    assert same is not None and (same.mean, same.high, same.n) == (1.0, 1.0, 2)
    other = overlap({"0": one}, {"0": kept([1, 2], [5, 900])})
    assert other is not None and (other.mean, other.low) == (0.0, 0.0)
    # 1 of 4 tokens, then 1 of 2.
    some = overlap({"0": one}, {"0": kept([3, 5], [1, 6])})
    assert some is not None and some.mean == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_samples_without_a_source_token_are_left_out(kept: Callable[..., KeptTokens]) -> None:
    found = overlap({"0": kept([1, 2], [1], [])}, {"0": kept([1, 2], [], [])})
    assert found is not None and (found.mean, found.n, found.low) == (1.0, 1, None)
    assert overlap({"0": kept([1, 2])}, {"0": kept([])}) is None


def test_only_common_samples_count(kept: Callable[..., KeptTokens]) -> None:
    found = overlap({"0": kept([1], [2], [3])}, {"0": kept([3], [4], first=2)})
    assert found is not None and (found.mean, found.n) == (1.0, 1)
    assert overlap({"0": kept([1])}, {"0": kept([1], first=1)}) is None


def test_the_interval_is_students_over_pictures(kept: Callable[..., KeptTokens]) -> None:
    """Jaccard 1, 1/2, 0 on three pictures; then two questions about the first, which are no two observations."""
    ours, theirs = kept([1], [1, 2], [1]), kept([1], [1], [2])
    found = overlap({"0": ours}, {"0": theirs})
    assert found is not None and found.mean == pytest.approx(0.5)
    half = T95_OF_TWO * stdev([1, 0.5, 0]) / sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.0, 1.0)) and half > 0.5
    sames = [[1, 2, 3]] * 3
    ours, theirs = kept(*sames), kept([1, 2, 3], [1, 2, 3], [1, 2])
    found = overlap({"0": ours}, {"0": theirs})
    assert found is not None and found.low == pytest.approx(found.mean - T95_OF_TWO * (1 / 3) / sqrt(3) / sqrt(3))
    twice = kept(*sames, pictures=["a", "a", "b"])
    clustered = overlap({"0": twice}, {"0": theirs})
    assert clustered is not None and found.low is not None and clustered.low is not None
    assert clustered.mean == found.mean and clustered.low < found.low


def test_seeds_are_paired_or_all_compared_with_the_only_one(kept: Callable[..., KeptTokens]) -> None:
    both = kept([1, 2], [3, 4])
    half, none = kept([1], [3]), kept([5], [6])
    paired = overlap({"0": both, "1": half, "7": none}, {"0": both, "1": both, "2": none})
    assert paired is not None and paired.mean == pytest.approx(fmean([1.0, 0.5])) and paired.n == 2
    against_one = overlap({"0": both, "1": half, "7": none}, {"3": both})
    assert against_one is not None and against_one.mean == pytest.approx(fmean([1.0, 0.5, 0.0]))
    assert against_one.low == 0.0 and against_one.high == 1.0, "three seeds so far apart say nothing"
    assert overlap({"0": both, "1": half}, {"2": both, "3": half}) is None, "no common seed"


@pytest.mark.parametrize(("n", "a", "b"), [(4, 2, 2), (6, 2, 3), (6, 5, 4), (5, 5, 2), (3, 1, 1)])
def test_chance_is_the_mean_over_all_selections(n: int, a: int, b: int) -> None:
    draws = product(combinations(range(n), a), combinations(range(n), b))
    expected = fmean(len({*one} & {*other}) / len({*one} | {*other}) for one, other in draws)
    assert chance_jaccard(n, a, b) == pytest.approx(expected)


def test_chance_is_averaged_over_samples_and_unknown_in_old_records(kept: Callable[..., KeptTokens]) -> None:
    ours, theirs = kept([1, 2], [0, 1, 2, 3, 4]), kept([2, 3], [1, 2])
    found = overlap({"0": ours}, {"0": theirs})
    assert found is not None
    assert found.chance == pytest.approx((chance_jaccard(8, 2, 2) + chance_jaccard(8, 5, 2)) / 2)
    old = overlap({"0": ours}, {"0": kept([2, 3], [1, 2], n_valid=None)})
    assert old is not None and old.mean == found.mean and old.chance is None


def record(name: str = "random", **config: object) -> Result:
    model = {"path": "w"}
    return {
        "selector": {},
        "choices": {"selector": name},
        "overrides": [],
        "data": {"name": "d"},
        "config": {"model": model, "adapter": None, "data": {"n": 4}, "selector": {}} | config,
    }


def test_which_systems_share_a_token_frame() -> None:
    base = token_frame(record())
    assert base == token_frame(record("shirg", data={"n": 4, "metrics": ["anls"], "limit": 3}, decode="fast"))
    assert (
        base
        == token_frame(record(selector_budget=3))
        == token_frame(record() | {"selector": {"geometry": "lavida_tiles"}})
    )
    assert base != token_frame(record(data={"n": 5}))
    assert base != token_frame(record(model={"path": "v"}))
    assert base != token_frame(record(adapter="own"))
    assert base != token_frame(record(shuffle_questions=True))
    assert base != token_frame(record() | {"data": {"name": "e"}})
    single = {"geometry": "single_672"}
    assert base != token_frame(record(selector=single)) == token_frame(record() | {"selector": single})


def test_adapters_of_ones_own_are_one_setting() -> None:
    own = [
        token_frame(record(name, adapter=f"outputs/e/seed-{seed}/{name}"))
        for seed, name in ((1, "shirg"), (2, "saint"))
    ]
    assert own[0] == own[1] != token_frame(record("saint", adapter="outputs/e/seed-1/shirg"))
    assert token_frame(record("shirg", adapter="a/shirg_div")) != own[0].replace("outputs/e/seed-*", "a")


def test_a_study_of_several_kinds(eval_here: Eval) -> None:
    """Two geometries, a selector without source tokens, two equal ones, and what the table shows of them."""
    words = ("data.n=24", "limit=6")
    names = {
        "pooled": ("selector=pooled",),
        "random": ("selector=random",),
        "again": ("selector=random", "shots=1"),
        "full": ("selector=full",),
        "single": ("selector=random", "selector.geometry=single_672"),
        "sparse": ("selector=random", "data.density=[sparse]"),
    }
    folders = {name: eval_here(*words, *more) for name, more in names.items()}
    jobs = {name: folder.name for name, folder in folders.items()}
    rows = {row["job"]: row for row in collect(folders["pooled"].parent)}

    def known(name: str) -> set[str]:
        return {other for other in jobs if rows[jobs[name]].get(f"overlap {jobs[other]} mean") is not None}

    assert known("random") == {"again", "full"} and known("full") == {"random", "again"}
    assert known("pooled") == known("single") == known("sparse") == set()
    random = rows[jobs["random"]]
    assert random[f"overlap {jobs['again']} mean"] == 1.0 and random[f"overlap {jobs['again']} n"] == 6
    assert random[f"overlap {jobs['full']} mean"] == 0.25 == rows[jobs["full"]][f"overlap {jobs['random']} mean"]
    assert random[f"overlap {jobs['full']} chance"] == pytest.approx(0.25)
    assert random[f"overlap {jobs['again']} chance"] == pytest.approx(chance_jaccard(320, 80, 80))
    shown = {column.title: column for column in columns(list(rows.values()))}
    kept_columns = ("coverage", "gini", "position gini", "most alike")
    assert all(shown[title].page_only and shown[title].secondary for title in kept_columns)
    assert dict(zip(rows, shown["coverage"].texts, strict=True))[jobs["pooled"]] == "-"
    table = markdown(list(rows.values()))
    assert not any(title in table for title in kept_columns), "only the page shows them"


def test_the_most_alike_is_so_beyond_chance() -> None:
    row: Row = {"overlap a mean": 0.6, "overlap a low": 0.55, "overlap a chance": 0.5}
    row |= {"overlap b mean": 0.3, "overlap b low": 0.2, "overlap b chance": 0.1}
    row |= {"overlap c mean": 0.9, "overlap c low": None, "overlap c chance": 0.1}
    names = {"a": "full", "b": "saint", "c": "one picture", "d": "other geometry"}
    assert alike_cell(row, names).text == "saint 0.30 (chance 0.10)"
    assert alike_cell(row | {"overlap b low": 0.1}, names).text == "full 0.60 (chance 0.50)"
    assert alike_cell(row | {"overlap b low": 0.1, "overlap a low": 0.5}, names).text == "none"
    assert alike_cell({}, names).text == "-"
    assert alike_cell({"overlap a mean": 0.9, "overlap a low": 0.8, "overlap a chance": None}, names).text == "-"


def test_a_study_from_before_has_overlaps_alone(tmp_path: Path) -> None:
    """Format 1 named neither the geometry nor the number of tokens."""
    study = tmp_path / "old"
    shutil.copytree(GOLDEN / "completed", study / "one")
    shutil.copytree(GOLDEN / "completed", study / "two")
    for name, budget in (("one", 80), ("two", 81)):
        result = result_of(study / name)
        result["job"], result["config"]["selector"]["budget"] = name, budget
        (study / name / "result.json").write_text(json.dumps(result))
    one, two = sorted(collect(study), key=lambda row: row["job"])
    assert one["overlap two mean"] == two["overlap one mean"] == 1.0 and one["overlap two n"] == 48
    assert one["overlap two chance"] is None
    shown = [column.title for column in columns([one, two])]
    assert not {"coverage", "gini", "position gini", "most alike"} & set(shown)
