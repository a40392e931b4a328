"""A study that an older version wrote, at commit 5e004d2: read, skipped, shown, and completed to the same answers."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from experiments.jobs.results import VERSION, config_hash, read_result
from tests.experiments.conftest import finish, result_of, start
from tests.experiments.test_job import rows_of

STUDY = Path(__file__).parents[1] / "golden/study_format_1"
FINISHED = (
    "eval_adapter-own_batch_size-4_data.n-48_selector-shirg",
    "eval_adapter-null_batch_size-4_data.n-48_selector-pooled",
)
KILLED = "eval_batch_size-4_data.n-48_selector-random"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two finished jobs, and one that was killed after five of its twelve batches."""
    return Path(shutil.copytree(STUDY, tmp_path / "outputs/old", ignore=shutil.ignore_patterns("completed")))


def test_a_record_of_format_1_is_read_as_the_format_of_today(study: Path) -> None:
    for folder in (*FINISHED, KILLED):
        before = result_of(study / folder)
        assert before["version"] == 1 and "_target_" in before["config"]["selector"]
        result = read_result(study / folder)
        assert result is not None and result["version"] == VERSION
        assert "_target_" not in json.dumps(result)
        assert result["config_hash"] == config_hash(result["config"]) != before["config_hash"]
        unchanged = before.keys() - {"version", "config", "config_hash"}
        assert {key: result[key] for key in unchanged} == {key: before[key] for key in unchanged}


def test_a_study_of_format_1_is_skipped_completed_and_shown(study: Path) -> None:
    same = ["study=old", "threads=1", "data.n=48", "batch_size=4", "resume=true"]
    stamps = {folder: (study / folder / "result.json").stat().st_mtime_ns for folder in FINISHED}
    for words in (["selector=shirg", "adapter=own"], ["selector=pooled", "adapter=null"], ["selector=random"]):
        code, out, err = finish(start("eval", *same, *words, cwd=study.parents[1]))
        assert (code, err) == (0, []), err
        assert ("finished already" in out) == (words != ["selector=random"])
    assert stamps == {folder: (study / folder / "result.json").stat().st_mtime_ns for folder in FINISHED}

    assert rows_of(study / KILLED) == rows_of(STUDY / "completed")
    done, expected = result_of(study / KILLED), result_of(STUDY / "completed")
    for result in (done, expected):
        del result["data"]["scorer"]  # which version of the metrics scored
    for key in ("quality", "tokens", "decoding", "data"):
        assert done[key] == expected[key], key
    rows = {row["selector"]: row for row in csv.DictReader((study / "table.csv").open())}
    assert rows.keys() == {"pooled", "random", "shirg"}
    for folder, selector in zip((*FINISHED, KILLED), ("shirg", "pooled", "random"), strict=True):
        score = result_of(study / folder)["quality"]["metrics"]["exact_match"]
        assert float(rows[selector]["exact_match mean"]) == pytest.approx(score["mean"], abs=1e-12)
    assert (study / "report.html").stat().st_size > 10_000
