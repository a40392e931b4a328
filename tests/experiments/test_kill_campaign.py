"""A few kills of the campaign, and that it sees what a kill could leave."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.experiments.conftest import ROOT, Here
from tests.experiments.kill_campaign import compare, kind_of


@pytest.mark.slow
def test_killed_commands_end_as_undisturbed_ones(tiny_weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    words = ["--n", "4", "--seed", "2", "--only", "eval,train", "--out", str(out), f"model.path={tiny_weights}"]
    command = [sys.executable, "-m", "tests.experiments.kill_campaign", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert (found["trials"], found["equal"], found["blocked"], found["garbage files"]) == (4, 4, 0, 0)
    assert found["kills"] >= 4 and found["by place"].keys() != {"time"}


def test_other_answers_lost_files_and_leftovers_are_seen(eval_here: Here, tmp_path: Path) -> None:
    job = eval_here("limit=2", "study=s", "shots=1")
    calm, study = job.parent, tmp_path / "copy"
    shutil.copytree(calm, study)
    assert compare(study, calm) == ([], [])
    table = pq.read_table(study / job.name / "samples.parquet")
    pq.write_table(table.slice(1), study / job.name / "samples.parquet")
    (study / "table.md").unlink()
    (study / ".table.csv.0123456789ab.tmp").touch()
    assert compare(study, calm) == (["table.md", f"{job.name}/samples.parquet"], [".table.csv.0123456789ab.tmp"])


def test_files_are_named_by_their_kind() -> None:
    names = [
        "s/.table.csv.0123456789ab.tmp",
        "s/job/shots/03_kept.jpg",
        "s/job/journal.arrow",
        "s/job/.last.ckpt.4f.tmp",
    ]
    assert list(map(kind_of, names)) == ["table.csv", "shots", "journal.arrow", "last.ckpt"]
