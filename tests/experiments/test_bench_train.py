"""The bench of training: its arithmetic, and that it trains what train.py trains."""

import pytest
import torch

from experiments.bench import training_step


def test_shares_and_rates_follow_from_the_steps() -> None:
    steps = [
        {"data": 10.0, "forward": 40.0, "backward": 40.0, "optimiser": 10.0},
        {"data": 0.0, "forward": 60.0, "backward": 30.0, "optimiser": 10.0},
        {"data": 20.0, "forward": 100.0, "backward": 60.0, "optimiser": 20.0},
    ]
    found = training_step.TrainRow(batch=8, steps=steps, tokens=2000).report()
    assert found["step_ms"] == 100
    assert found["samples_per_s"] == pytest.approx(3 * 8 / 0.4)
    assert found["tokens_per_s"] == pytest.approx(2000 / 0.4)
    assert found["shares"] == pytest.approx({"data": 0.075, "forward": 0.5, "backward": 0.325, "optimiser": 0.1})


def test_steps_are_timed() -> None:
    measured = training_step.run(device=torch.device("cpu"), model="tiny", batch=[3, 6], workers=0, repeats=2)
    assert [row.batch for row in measured.rows] == [3, 6]
    for row in measured.rows:
        assert len(row.steps) == 2
        assert all(
            step.keys() == set(training_step.PHASES) and step["forward"] > 0 and step["backward"] > 0
            for step in row.steps
        )
        # 80 picture tokens, the prompt and the three slots of the answer: the same for every glyph question.
        assert row.tokens % (2 * row.batch) == 0 and row.tokens > 2 * row.batch * 83
    head, *lines = measured.lines()
    assert "% data" in head and len(lines) == 2
