"""What a row is compared to, over which family, and whether at an equal budget."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.analysis.columns import columns, flags, markdown, unequal
from experiments.analysis.paired import budget_ratio
from experiments.analysis.rows import collect
from experiments.analysis.stats import holm
from experiments.analysis.table import refresh
from experiments.compare import table
from tests.experiments.conftest import result_of
from tests.experiments.test_seeds import plant

Eval = Callable[..., Path]


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
    got = budget_ratio(row, [pooled, row])
    assert got == (None if ratio is None else pytest.approx(ratio, abs=0.1 * abs(ratio - 1)))
    assert unequal(row | {"budget ratio": got}) is (ratio not in (None, 1.0))
    assert budget_ratio({**row, "compared to pooled": "absent"}, [pooled]) is None


def test_an_impossible_figure_is_flagged_and_not_printed(eval_here: Eval) -> None:
    job = eval_here("selector=pooled", "limit=6")
    result = result_of(job)
    result["times"]["ms_per_sample"]["denoise"] = 0.000123
    result["times"]["flags"] = {"denoise ms": "0.000123 ms is below the floor of 0.01 ms"}
    (job / "result.json").write_text(json.dumps(result))
    (row,) = refresh(job.parent)
    assert flags(row)["denoise ms"] == result["times"]["flags"]["denoise ms"] and "total ms" in flags(row)
    shown = {column.title: column.texts for column in columns([row])}
    assert shown["denoise ms"] == shown["total ms"] == ["impossible"]
    assert "below the floor of 0.01 ms" in shown["flags"][0]
    assert row["denoise ms"] is row["total ms"] is None and "0.000123," not in (job.parent / "table.csv").read_text()
    assert "impossible" in (job.parent / "table.md").read_text()


def test_one_choice_over_several_seeds(eval_here: Eval) -> None:
    eighths = {"pooled": 3, "shirg": 5}
    for selector, right in eighths.items():
        for seed in (0, 1, 2):
            job = eval_here(f"selector={selector}", f"seed={seed}", "data.n=48", "data.seed=0")
            # Seed 2 gains a quarter more.
            more = 2 * (seed == 2 and selector == "shirg")
            plant(job, lambda i, right=right + more: i % 8 < right)
    lines = [line.strip("| ").split(" | ") for line in table(job.parent, "selector", "pooled")]
    head, _, pooled, shirg = lines
    assert pooled[:4] == ["pooled", "pooled", "48", "3"] and shirg[:4] == ["shirg", "shirg", "48", "3"]
    assert pooled[head.index("fine, against pooled")] == "-"
    assert shirg[head.index("fine, against pooled")].startswith("+33.3 [")
    assert float(pooled[head.index("fine")]) == pytest.approx(37.5, abs=0.1)
    with pytest.raises(ValueError, match="no finished evaluation has adapter=own"):
        table(job.parent, "adapter", "own")
    both = table(job.parent, "adapter", "null")
    assert len(both) == 4, "nothing to compare: each stands alone"


def test_an_ablation_may_take_the_question_away(eval_here: Eval) -> None:
    eval_here("selector=shirg", "data.n=24")
    job = eval_here("selector=shirg", "data.n=24", "ablation=relevance_none")
    lines = [line.strip("| ").split(" | ") for line in table(job.parent, "ablation", "none")]
    assert [line[:2] for line in lines[2:]] == [["shirg", "none"], ["shirg relevance_none", "relevance_none"]]
