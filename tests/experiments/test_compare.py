"""The command `experiments.compare`: systems that differ in one choice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.compare import main, paired_table
from tests.experiments.planting import plant

Eval = Callable[..., Path]


def test_one_choice_over_several_seeds(eval_here: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    eighths = {"pooled": 3, "shirg": 5}
    for selector, right in eighths.items():
        for seed in (0, 1, 2):
            job = eval_here(f"selector={selector}", f"seed={seed}", "data.n=48", "data.seed=0")
            # Seed 2 gains a quarter more. Other answers in each seed: seeds that change nothing count once.
            more = 2 * (seed == 2 and selector == "shirg")
            plant(job, lambda i, right=right + more, seed=seed: (i + seed) % 8 < right)
    pooled, shirg = paired_table(job.parent, "selector", "pooled").to_dict("records")
    assert list(pooled.values())[:4] == ["pooled", "pooled", "48", "3"]
    assert list(shirg.values())[:4] == ["shirg", "shirg", "48", "3"]
    assert pooled["fine, against pooled"] == "-" and shirg["fine, against pooled"].startswith("+33.3 [")
    assert float(pooled["fine"]) == pytest.approx(37.5, abs=0.1)
    assert len(paired_table(job.parent, "adapter", "null")) == 2, "nothing to compare: each is alone in its block"
    capsys.readouterr()
    main([str(job.parent), "selector=pooled"])
    head, align, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert head == list(pooled) and align[0].startswith(":-") and align[2].endswith("-:")
    assert rows == [list(pooled.values()), list(shirg.values())]


def test_an_ablation_may_take_the_question_away(eval_here: Eval) -> None:
    eval_here("selector=shirg", "data.n=24")
    job = eval_here("selector=shirg", "data.n=24", "ablation=relevance_none")
    frame = paired_table(job.parent, "ablation", "none")
    assert frame["system"].tolist() == ["shirg", "shirg relevance_none"]
    assert frame["ablation"].tolist() == ["none", "relevance_none"]
