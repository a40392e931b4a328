"""Names of jobs' folders: the same run in the same folder, two different runs never."""

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.build import compose_eval
from experiments.job_names import MAX_BYTES, job_name, merged_name, study_folder
from tests.experiments.conftest import Command, result_of, rows_of
from tests.experiments.jobs.test_results import KILLED, STUDY

Eval = Callable[..., Path]


def test_a_plain_name_is_made_of_the_overrides_in_order() -> None:
    assert job_name("eval", []) == "eval_defaults"
    words = ["selector=norm_topk", "study=s", "++resume=true", "data.n=48", "batch_size=4", "logger=wandb"]
    assert job_name("eval", words) == "eval_batch_size-4_data.n-48_selector-norm_topk"
    assert job_name("eval", ["selector.neighbour.sign=-1", "cache.budget=0.5"]) == (
        "eval_cache.budget-0.5_selector.neighbour.sign--1"
    )


LONG = "data.root=/" + "x" * 200
DIFFERENT = [
    ['data.suffix=" ?"'],
    ['data.suffix=" !"'],
    ["data.root=a/b"],
    ["data.root=a-b"],
    ["data.root=a=b"],
    ["data.n=[1,2]"],
    ["data.n=1-2"],
    ["+data.n=1"],
    ["++data.n=1"],
    ["data.n=1"],
    ["~data"],
    ["data.name=x_seed-1"],
    ["data.name=x", "seed=1"],
    ["data.name=x."],
    ["data.name=x"],
    *([LONG, f"model.path={'y' * 99}", "shards=4", f"shard={number}"] for number in range(4)),
    [f"data.root={'图' * 72}a"],
    [f"data.root={'图' * 72}b"],
]


def test_different_overrides_never_share_a_folder() -> None:
    names = [job_name("eval", words) for words in DIFFERENT]
    assert len(set(names)) == len(DIFFERENT)
    assert all(len(name.encode()) <= MAX_BYTES + 9 for name in names)
    assert names == [job_name("eval", words[::-1]) for words in DIFFERENT], "their order does not matter"


values = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
words = st.lists(
    st.tuples(st.sampled_from(["data.root", "seed", "batch_size"]), values), max_size=3, unique_by=lambda p: p[0]
)


@given(st.lists(words, min_size=2, max_size=4))
def test_drawn_overrides_never_share_a_folder(runs: list[list[tuple[str, str]]]) -> None:
    for one, other in combinations([sorted(f"{key}={value}" for key, value in run) for run in runs], 2):
        assert (job_name("eval", one) == job_name("eval", other)) == (one == other)


def test_a_path_to_a_job_is_a_plain_value_on_a_command_line() -> None:
    for overrides in (["lora.rank=64", "data.density=[sparse,dense]"], ["data.suffix=' (=?)'"], [LONG]):
        path = f"outputs/default/{job_name('train', overrides)}/adapter"
        assert compose_eval(f"adapter={path}").adapter == path


def test_shards_make_a_job_of_their_own() -> None:
    study = Path("outputs/s")
    for common in (["shards=2"], ["shards=2", LONG, "model.path=" + "y" * 99]):
        for first in ([], ["shard=0"]):  # shard=0 is the default
            parts = [job_name("eval", [*common, *first]), job_name("eval", [*common, "shard=1"])]
            assert merged_name(parts, [*common, *first], study) not in parts
            assert merged_name(parts, [*common, *first], study) == merged_name(parts, [*common, "shard=1"], study)


def test_shards_with_long_paths_are_merged_and_all_stay(
    picture_folder: Callable[..., Path], eval_here: Eval, tmp_path: Path
) -> None:
    data = picture_folder("p" * 120, ["what?"] * 6)
    words = ("data=folder", f"data.root={data}", "batch_size=2", "selector=pooled", "study=s", "shards=3", "shots=0")
    parts = [eval_here(*words, f"shard={number}") for number in range(3)]
    study = tmp_path / "outputs/s"
    (merged,) = {path.parent for path in study.glob("*/result.json")} - set(parts)
    assert [result_of(part)["config"]["shard"] for part in parts] == [0, 1, 2]
    assert result_of(merged)["shards"] == [part.name for part in parts]
    assert [row["id"] for row in rows_of(merged)] == [f"{i}.png#0" for i in range(6)]
    eval_here(*words, "shard=0", "resume=true")


def test_values_that_differ_in_dropped_characters_are_two_jobs(command: Command, tmp_path: Path) -> None:
    ended = command(
        "eval", "-m", "selector=pooled", "limit=2", "shots=0", "study=s", 'data.suffix=" ?"," !"', "overwrite=true"
    )
    assert (ended.code, ended.err) == (0, [])
    suffixes = {result_of(path.parent)["config"]["data"]["suffix"] for path in tmp_path.glob("outputs/s/*/result.json")}
    assert suffixes == {" ?", " !"}


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_from_before_digests_keeps_its_name(own: bool, command: Command, tmp_path: Path) -> None:
    """A study whose jobs have a path in their overrides, as names were before: characters dropped, no digest."""
    adapter = STUDY.parents[2] / "weights/tiny/adapters/shirg"
    words = ["study=old", "selector=shirg", "limit=2", "shots=0", f"adapter={adapter}"]
    new = command("eval", *words)
    assert new.code == 0
    (folder,) = (path.parent for path in tmp_path.glob("outputs/old/*/result.json"))
    before = folder.with_name(folder.name.rpartition("-")[0])
    folder.rename(before)
    record = result_of(before) | {"job": before.name}
    if not own:  # the record of another run: its folder is left alone
        record["overrides"] = ["selector=shirg"]
    (before / "result.json").write_text(json.dumps(record))
    ended = command("eval", *words, "resume=true")
    assert ended.code == 0 and (f"skip  {before.name}: finished already" in ended.out) is own
    assert folder.exists() is not own


def test_plain_names_of_old_studies_are_those_of_today(tmp_path: Path) -> None:
    study = Path(shutil.copytree(STUDY, tmp_path / "old"))
    for folder in study.glob("eval_*"):
        assert job_name("eval", result_of(folder)["overrides"], study) == folder.name
    assert (study / KILLED).is_dir()


@pytest.mark.parametrize("study", ["../x", "a/b", "/abs", ".", "..", ".hidden", " ", "x" * 300, "图" * 72, "a\\b"])
def test_a_study_cannot_leave_its_place(study: str, command: Command, tmp_path: Path) -> None:
    for words in ([f"study='{study}'"], ["-m", f"study='{study}'"]):
        ended = command("eval", *words, "selector=pooled", "limit=2", cwd=tmp_path / "deep/er")
        assert (ended.code, ended.out, len(ended.err)) == (1, "", 1)
        assert ended.err[0].startswith("error: study=") and "a study is a folder in outputs/" in ended.err[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_names_of_studies_are_theirs() -> None:
    for name in ("main_table", "run (1)", "a=b", "étude", "图", "1", "x.y"):
        assert study_folder(name) == f"outputs/{name}"
