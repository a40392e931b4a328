"""Position bias by hand: discrepancies between places, over-counting, macro F1."""

from typing import Any

import pytest

from experiments.analysis.position_bias import probe


def answer(entity: str, place: str, task: str, score: float, prediction: str = "", right: str = "1") -> dict[str, Any]:
    return {
        "entity": entity,
        "place": place,
        "subtask": task,
        "scores": {"entity_match": score},
        "prediction": prediction,
        "answers": [right],
        "recall": score,
    }


def test_discrepancies() -> None:
    rows = [
        *(answer(e, "centre", "identification", 1.0) for e in "ab" for _ in range(4)),
        *(answer("a", "edge", "identification", score) for score in (1.0, 0.0, 0.0, 1.0)),
        *(answer("b", "edge", "identification", 1.0) for _ in range(4)),
        *(answer(e, "junction", "identification", 0.0) for e in "ab"),
        answer("a", "near", "identification", 0.0),
    ]
    found = probe(rows, "entity_match")
    assert found is not None
    assert found["accuracy"]["all"]["edge"]["mean"] == 0.75
    assert found["disc1"]["all"]["mean"] == 0.25 and found["disc1"]["all"]["n"] == 2
    assert found["disc2"]["identification"]["mean"] == 1.0 and found["disc2"]["identification"]["relative"] == 1.0
    assert found["disc1"]["all"]["low"] <= 0.25 <= found["disc1"]["all"]["high"]
    assert found["recall"] == {"centre": 1.0, "edge": 0.75, "junction": 0.0, "near": 0.0}
    assert found["overcount"] == {} and found["counting_macro_f1"] is None
    assert probe([answer("a", "", "identification", 1.0)], "entity_match") is None
    assert probe([answer("a", "centre", "identification", 1.0)], "entity_match")["disc1"]["all"] is None  # type: ignore[index]


def test_too_many_are_counted_where_a_cut_doubles_them() -> None:
    rows = [
        answer("a", "centre", "counting", 1.0, "one", "1"),
        answer("a", "edge", "counting", 0.0, "2", "1"),
        answer("a", "edge", "counting", 1.0, "2.", "2"),
        answer("a", "edge", "counting", 0.0, "many", "0"),
    ]
    found = probe(rows, "entity_match")
    assert found is not None
    assert found["overcount"] == {"centre": 0.0, "edge": pytest.approx(1 / 3)}
    # F1: of 0 none is found; of 1 one of two; of 2 one, with one false.
    assert found["counting_macro_f1"] == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)
