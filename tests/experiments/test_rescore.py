"""`rescore=`: scores become those of a new run; what does not fit is refused, and nothing is lost."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from experiments import rescore as module
from experiments.analysis.table import collect
from experiments.analysis.turns import LAST_REFRESH
from experiments.jobs.results import LOCK
from experiments.metrics.answers import scorer_version
from experiments.metrics.text import ExactMatch
from experiments.report.publish import publish
from experiments.rescore import RescoreRequest, parse, rescore, rescore_all
from tests.data import official
from tests.experiments.conftest import Command, result_of, rows_of

Eval = Callable[..., Path]
FEW = ("selector=pooled", "shots=2", "threads=1")
GLYPHS = (*FEW, "data.n=18", "study=s")
OF_GENERATION = ("tokens", "decoding", "model", "selector", "cache", "environment", "choices", "job", "study")


def but_for_time(result: dict[str, Any]) -> dict[str, Any]:
    """What a rescored job shares with one that was run with these metrics."""
    return {key: value for key, value in result.items() if key not in ("job", "times", "rescored")}


def all_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def edit(folder: Path, **changes: Any) -> None:
    (folder / "result.json").write_text(json.dumps({**result_of(folder), **changes}))


def test_scored_again_is_scored_afresh(eval_here: Eval, tmp_path: Path) -> None:
    """Every metric that ChartQA has, corpus metrics among them, put in place of one."""
    read = official.write("chartqa", "disk", tmp_path / "charts")
    words = (*read, *FEW, "decode.max_new_tokens=4", "study=s")
    asked = "data.metrics=[relaxed_accuracy,relaxed_strict_year,cider_d,cider_d_clean,exact_match_clean]"
    afresh = eval_here(*words, asked, root=tmp_path / "afresh")
    again = eval_here(*words, "data.metrics=[exact_match]", root=tmp_path / "again")
    assert list(result_of(again)["quality"]["metrics"]) == ["exact_match"]
    rescore(again, parse(["rescore=x", asked]).metrics)
    ours, theirs = result_of(again), result_of(afresh)
    assert ours["quality"]["corpora"]["cider_d"]["n"] == official.N
    assert but_for_time(ours) == but_for_time(theirs)
    assert rows_of(again) == rows_of(afresh)
    assert pq.read_schema(again / "samples.parquet") == pq.read_schema(afresh / "samples.parquet")
    for shot in ("00.json", "01.json"):
        assert (again / "shots" / shot).read_bytes() == (afresh / "shots" / shot).read_bytes()
    ours, theirs = (
        {key: value for key, value in row.items() if not re.fullmatch(r"jobs?|note|waited|.* ms( q[13])?", key)}
        for row in (collect(job.parent)[0] for job in (again, afresh))
    )
    assert ours == theirs


def test_a_changed_metric_changes_scores_alone(eval_here: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    job = eval_here(*GLYPHS)
    before, rows = result_of(job), rows_of(job)
    monkeypatch.setattr(ExactMatch, "compare", lambda self, prediction, references: 0.25)
    old, new = rescore(job)
    after = result_of(job)
    assert new["metrics"]["exact_match"]["mean"] == 0.25 != old["metrics"]["exact_match"]["mean"]
    assert after["quality"] == new and before["quality"] == old
    assert {key: after[key] for key in before if key not in ("quality", "times", "data")} == {
        key: before[key] for key in before if key not in ("quality", "times", "data")
    }
    assert {k: v for k, v in after["times"].items() if k != "rescored"} == before["times"]
    assert rows_of(job) == [{**row, "score_exact_match": 0.25} for row in rows]
    (row,) = collect(job.parent)
    assert row["exact_match mean"] == 0.25
    publish(job.parent)  # what the command does at its end
    table = (job.parent / "table.md").read_text()
    assert " 25.0 " in table and f"rescored {after['times']['rescored'][:10]}" in table


def test_the_result_says_what_scored_it(eval_here: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    job = eval_here(*GLYPHS)
    assert result_of(job)["data"]["scorer"] == scorer_version() and re.fullmatch(r"[0-9a-f]{16}", scorer_version())
    monkeypatch.setattr(module, "scorer_version", lambda: "another")
    rescore(job, ["anls", "exact_match"])
    after = result_of(job)
    assert after["data"]["scorer"] == "another"
    assert after["rescored"]["before"] == {"metrics": ["exact_match"], "scorer": scorer_version()}
    assert set(after["rescored"]) == {"before", "git", "git_dirty"}
    assert after["command"].endswith("'data.metrics=[anls,exact_match]'")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", after["times"]["rescored"])


def test_the_command(tiny_weights: Path, tmp_path: Path, command: Command) -> None:
    """On jobs whose weights are gone; a job that cannot be scored does not stop the others."""
    words = [f"model.path={tiny_weights}", "data.n=6", "study=s", "shots=0", "threads=1"]
    ended = command("eval", "-m", *words, "selector=pooled,random", "limit=4")
    assert (ended.code, ended.err) == (0, [])
    first, second = sorted((tmp_path / "outputs/s").glob("eval_*/"))
    for job in (first, second):
        config = result_of(job)["config"]
        edit(job, config={**config, "model": {**config["model"], "path": "nowhere"}})
    edit(second, status="failed")
    kept = all_files(second)
    ended = command("eval", "rescore=outputs/s/*", "data.metrics=[token_f1,exact_match]")
    assert ended.code == 1
    assert len(ended.err) == 1 and re.fullmatch(
        r"error: rescore=outputs/s/eval_\S+selector-random\S* is a job of eval.py with status failed: only a finished "
        "job of eval.py has answers to score; resume=true finishes it",
        ended.err[0],
    )
    assert re.search(rf"ok    {first.name}: exact_match \d+\.\d -> token_f1 \d+\.\d\n", ended.out)
    assert result_of(first)["quality"]["metric"] == "token_f1" and all_files(second) == kept
    assert "token_f1" in (tmp_path / "outputs/s/table.md").read_text()


def test_shards_are_scored_as_a_whole(eval_here: Eval) -> None:
    for shard in (0, 1):
        part = eval_here(*GLYPHS, "shards=2", f"shard={shard}")
    (merged,) = (path for path in part.parent.glob("eval_*/") if "shard-" not in path.name)
    with pytest.raises(ValueError, match="is one of 2 shards: score the job that they make together"):
        rescore(part)
    rescore(merged, ["anls"])
    assert result_of(merged)["quality"]["metric"] == "anls"
    (row,) = collect(part.parent)
    assert "anls mean" in row, "the table is made of the whole"


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (["target_match", "exact_match"], "data.metrics: target_match needs target, and no sample of eval_"),
        (["exact_match", "entity_recall"], "data.metrics: entity_recall needs boxes of the evidence, and no sample of"),
        (["vqa_accuracy"], "soft accuracy needs the answers of 4 or more people, and a sample has 1"),
        (["bleu"], "metric 'bleu' does not exist; choose from anls"),
    ],
)
def test_metrics_that_the_answers_cannot_feed(
    eval_here: Eval, picture_folder: Callable[..., Path], metrics: list[str], sentence: str
) -> None:
    job = eval_here("data=folder", f"data.root={picture_folder('mine')}", *FEW, "decode.max_new_tokens=4")
    kept = all_files(job)
    with pytest.raises(ValueError, match=sentence):
        rescore(job, metrics)
    assert all_files(job) == kept


def test_answers_that_are_not_those_of_the_result(eval_here: Eval) -> None:
    job = eval_here(*GLYPHS)
    table = pq.read_table(job / "samples.parquet")
    others = table.set_column(0, "id", pa.array([f"{i}x" for i in table["id"].to_pylist()]))
    pq.write_table(others, job / "samples.parquet")
    ids = result_of(job)["data"]["ids"]
    with pytest.raises(
        ValueError, match=rf"samples.parquet holds other samples .* than result.json scored \(ids {ids}"
    ):
        rescore(job)
    (job / "samples.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has no samples.parquet: overwrite=true answers again"):
        rescore(job)


def test_a_process_that_writes_the_table_is_not_waited_for(eval_here: Eval) -> None:
    job = eval_here(*GLYPHS)
    (job.parent / LAST_REFRESH).unlink()
    with FileLock(job.parent / ".table.lock"):
        before, after = rescore(job)
    assert before["metrics"] == after["metrics"] and not (job.parent / LAST_REFRESH).exists()
    rescore(job)
    assert (job.parent / LAST_REFRESH).exists()


def test_jobs_that_have_nothing_to_score(eval_here: Eval, tmp_path: Path) -> None:
    job = eval_here(*GLYPHS)
    with FileLock(job / LOCK), pytest.raises(ValueError, match="another process is running this job"):
        rescore(job)
    edit(job, verb="train")
    with pytest.raises(ValueError, match="is a job of train.py with status ok"):
        rescore(job)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no result.json in it"):
        rescore(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(ValueError, match=r"rescore=nowhere/\*: no folder of a job of eval.py matches"):
        rescore_all(RescoreRequest("nowhere/*", None))
