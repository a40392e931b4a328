"""Names of systems: as short as they can be, and never the same twice."""

from typing import Any

import pytest

from experiments.analysis.system_names import labels, short


def row(selector: str, changes: str = "", **more: Any) -> dict[str, Any]:
    given = {"selector": selector, "changes": changes, "budget": "", "dataset": "glyphs", "data": "synth_glyphs"}
    return {**given, "limited": False, "n": 96, "job": f"eval_{selector}_{changes}", **more}


OWN = "adapter=own"
TRAINED = "adapter=outputs/s/train_lora.rank-{}_selector-shirg/adapter"


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([row("pooled"), row("shirg"), row("shirg", OWN)], ["pooled", "shirg", "shirg + LoRA"]),
        ([row("pooled", OWN), row("shirg", OWN)], ["pooled", "shirg"]),
        (
            [row("shirg", TRAINED.format(rank), **{"lora rank": rank}) for rank in (16, 64)],
            ["shirg + LoRA r16", "shirg + LoRA r64"],
        ),
        (
            [row("shirg", TRAINED.format(rank)) for rank in (16, 64)],
            ["shirg + LoRA lora.rank-16", "shirg + LoRA lora.rank-64"],
        ),
        ([row("shirg", OWN), row("shirg", "adapter=random")], ["shirg + LoRA own", "shirg + LoRA random"]),
        (
            [row("pooled"), row("shirg", budget="base (80)"), row("shirg", budget="40"), row("saint", budget="40")],
            ["pooled", "shirg 80", "shirg 40", "saint"],
        ),
        (
            [row("pooled", "experiment=B0"), row("shirg", "ablation=no_scaffold relevance=none selector.norm=rank")],
            ["pooled", "shirg no_scaffold relevance=none norm=rank"],
        ),
        (
            [row("pooled", dataset="charts"), row("pooled"), row("full")],
            ["pooled charts", "pooled glyphs", "full"],
        ),
        ([row("pooled", "data.n=9", n=9, limited=True), row("pooled")], ["pooled 9 samples", "pooled"]),
        ([row("shirg"), row("shirg")], ["shirg", "shirg"]),
        ([row("shirg", job="a"), row("shirg", job="b")], ["shirg (a)", "shirg (b)"]),
    ],
)
def test_the_shortest_name_that_tells_systems_apart(rows: list[dict[str, Any]], names: list[str]) -> None:
    assert labels(rows) == names


def test_a_column_of_datasets_needs_no_datasets_in_names() -> None:
    rows = [row("pooled", dataset="charts"), row("pooled"), row("shirg")]
    assert labels(rows, with_data=False) == ["pooled", "pooled", "shirg"]


def test_overrides_in_short() -> None:
    words = ["ablation=sign_flip", "+selector.norm=rank", "lora.rank=32", "data.root=/a/b/mine/", "adapter=x/y"]
    assert [short(word) for word in words] == ["sign_flip", "norm=rank", "lora.rank=32", "data.root=mine", "+ LoRA y"]
