"""Every selector through the verb `eval`, and the control that asks another question."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.schema import CONF

Eval = Callable[..., Path]
WITHOUT_BUDGET = {"pooled": 88, "full": 336, "global_only": 64}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "selector").glob("*.yaml")))
def test_every_selector_answers(eval_here: Eval, name: str) -> None:
    """The job itself checks that each picture is fed what the selector owes it."""
    own = [] if name in WITHOUT_BUDGET else ["selector.budget=70"]  # variants of the notes do not follow budget=
    folder = eval_here(f"selector={name}", "limit=4", *own, "shots=0")
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [row["n_visual"] for row in rows] == [WITHOUT_BUDGET.get(name, 70)] * 4
    if name == "oracle":
        assert [row["recall"] for row in rows if row["recall"] is not None] == [1.0] * 4


def test_another_question_changes_what_is_kept_and_not_what_is_asked(eval_here: Eval) -> None:
    common = ("selector=shirg", "data.n=24", "shots=0", "study=shuffle")
    right, wrong, again = (
        pq.read_table(eval_here(*common, *overrides) / "samples.parquet").to_pylist()
        for overrides in ([], ["shuffle_questions=true"], ["shuffle_questions=true", "overwrite=true"])
    )
    assert [row["question"] for row in right] == [row["question"] for row in wrong]
    assert [row["prompt"] for row in right] == [row["prompt"] for row in wrong]
    assert sum(a["kept"] != b["kept"] for a, b in zip(right, wrong, strict=True)) == len(right)
    assert [row["kept"] for row in wrong] == [row["kept"] for row in again]
