"""`hydra/sweeper=optuna`: the options of each job follow from the scores of the jobs before it, never from the test."""

import re
from pathlib import Path

import pytest
import yaml

from experiments.jobs.launchers import JobOutcome
from tests.experiments.conftest import Command, result_of

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

SEARCH = ["sweep=tune_shirg", "study=s", "data.n=24", "data.density=sparse", "hydra.sweeper.n_trials=3", "threads=1"]


def test_a_search_takes_the_best_score_and_goes_on_where_it_stopped(command: Command, tmp_path: Path) -> None:
    done = command("eval", *SEARCH)
    assert done.code == 0, done.err
    folders = sorted((tmp_path / "outputs/s").glob("eval_*"))
    found = {tuple(result_of(folder)["overrides"]): result_of(folder)["quality"] for folder in folders}
    scores = [quality["metrics"]["exact_match"]["mean"] for quality in found.values()]
    best = yaml.safe_load((tmp_path / "outputs/s/optimization_results.yaml").read_text())
    assert len(folders) == 3 and best["best_value"] == max(scores)
    assert set(best["best_params"]) == {
        "selector.weights.similarity",
        "selector.weights.neighbour",
        "selector.neighbour.sign",
    }
    assert all(result_of(folder)["data"]["split"] == "val" for folder in folders)
    assert (tmp_path / "outputs/s/table.md").read_text().count("| shirg") == 3

    again = command("eval", *SEARCH, "resume=true")
    assert again.code == 0 and len(re.findall("^skip", again.out, re.MULTILINE)) == 3
    assert yaml.safe_load((tmp_path / "outputs/s/optimization_results.yaml").read_text()) == best


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.split=test"], "hydra/sweeper: a search would choose options on the test split; give data.split=val"),
        (["hydra.sweeper.direction=minimize"], "scores are better when they are higher; give maximize"),
    ],
)
def test_a_search_for_the_wrong_thing_is_refused(
    command: Command, tmp_path: Path, words: list[str], sentence: str
) -> None:
    done = command("eval", *SEARCH, *words)
    assert done.code == 1 and len(done.err) == 1 and sentence in done.err[0]
    assert not list((tmp_path / "outputs").glob("s/eval_*"))


def test_a_job_without_a_score_is_no_number(tmp_path: Path) -> None:
    for ok in (True, False):
        with pytest.raises(ValueError, match="has no score"):
            float(JobOutcome(tmp_path, ok, ""))
