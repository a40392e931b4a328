"""A damaged folder in a study is named and left out; the jobs beside it end as ever."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import errors
from experiments.analysis.study import read_study
from experiments.analysis.table import collect
from tests.experiments.conftest import result_of
from tests.experiments.planting import change_result

Eval = Callable[..., Path]
WORDS = ("data.n=12", "study=s", "shots=1")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def without(job: Path, *keys: str) -> None:
    kept = {key: value for key, value in result_of(job).items() if key not in keys}
    (job / "result.json").write_text(json.dumps(kept))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn record": (lambda job: cut(job / "result.json"), "is not valid JSON"),
    "empty record": (lambda job: (job / "result.json").write_text(""), "is not valid JSON"),
    "list as record": (lambda job: (job / "result.json").write_text("[1]"), "is not a JSON object"),
    "nested record": (lambda job: (job / "result.json").write_text("[" * 10**5), "is not valid JSON"),
    "not UTF-8": (lambda job: (job / "result.json").write_bytes(b'{"version": "\xff"}'), "is not valid JSON"),
    "other version": (lambda job: change_result(job, version=99), "has format 99"),
    "empty object": (lambda job: (job / "result.json").write_text('{"version": 2}'), "KeyError: 'verb'"),
    "no quality": (lambda job: without(job, "quality"), "not the record of a job"),
    "no data": (lambda job: without(job, "data"), "not the record of a job"),
    "text as config": (lambda job: change_result(job, config="none"), "not the record of a job"),
    "text as a number": (lambda job: change_result(job, times={"ms_per_sample": {"total": "1"}}), "total ms is '1'"),
    "no samples": (lambda job: (job / "samples.parquet").unlink(), "samples.parquet"),
    "torn samples": (lambda job: cut(job / "samples.parquet"), "not the record of a job"),
    "empty samples": (lambda job: (job / "samples.parquet").write_bytes(b""), "not the record of a job"),
    "loop of links": (lambda job: loop(job / "samples.parquet"), "samples.parquet"),
    "text as samples": (lambda job: (job / "samples.parquet").write_text("id,score\n"), "not the record of a job"),
}


@pytest.fixture
def two(eval_here: Eval, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(errors, "_LEFT_OUT", set())
    return eval_here("selector=pooled", *WORDS), eval_here("selector=uniform_grid", *WORDS)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_neighbour_is_left_out_with_one_line(
    kind: str, two: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    job, other = two
    damage, why = DAMAGES[kind]
    damage(other)
    capfd.readouterr()
    for _ in range(2):
        assert [row["job"] for row in collect(job.parent)] == [job.name]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"left out  {other}: ") and why in line


def test_a_job_ends_well_beside_damaged_ones(
    two: tuple[Path, Path], eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder of an example as well: a foreign name, a link, a file that is no picture."""
    job, other = two
    cut(other / "result.json")
    (job / "shots/abc.json").write_text("{}")
    (job / "shots/07.json").write_bytes((job / "shots/00.json").read_bytes())
    secret = job.parent / "secret"
    secret.write_bytes((job / "shots/00.jpg").read_bytes())
    (job / "shots/07.jpg").symlink_to(secret)
    (job / "shots/07_kept.jpg").write_bytes(b"text")
    (job.parent / "limits.json").write_text("[")
    capfd.readouterr()
    third = eval_here("selector=random", *WORDS)
    lines = capfd.readouterr().err.splitlines()
    names = [Path(line.split(": ")[0].removeprefix("left out  ")).name for line in lines]
    assert names == [other.name, "07.json", "abc.json"]
    assert {row["job"] for row in collect(third.parent)} == {job.name, third.name}
    assert (third.parent / "report.html").stat().st_size > 10_000


def test_a_record_is_that_of_its_folder(two: tuple[Path, Path]) -> None:
    """A folder that was renamed, or copied from another study."""
    moved = two[1].rename(two[1].with_name("eval_mine"))
    assert read_study(moved.parent)[moved]["job"] == "eval_mine"
    rows = {row["job"]: row for row in collect(moved.parent)}
    assert rows["eval_mine"]["compared to pooled"] == two[0].name and "delta vs pooled mean" in rows["eval_mine"]
