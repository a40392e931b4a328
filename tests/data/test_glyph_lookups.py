"""Text contexts for the language model: one answer each, at every length of the curriculum."""

import numpy as np
import pytest

from experiments.data.synthetic.glyphs import draw_lookups
from experiments.data.synthetic.glyphs.questions import DIGIT, LETTER
from experiments.data.synthetic.glyphs.scene import FIRST_DIGIT, FIRST_FOIL, FIRST_LETTER


@pytest.mark.parametrize("cells", [2, 6, 7, 24, 64, 100])
def test_every_question_has_one_answer_and_it_is_the_given_one(cells: int) -> None:
    drawn = draw_lookups(np.random.default_rng(0), batch=50, cells=cells, questions=4)
    assert drawn.char_BN.shape == drawn.colour_BN.shape == (50, cells)
    assert drawn.task_BG.shape == drawn.argument_BG.shape == drawn.answer_BG.shape == (50, 4)
    for row in range(50):
        char, colour = drawn.char_BN[row], drawn.colour_BN[row]
        digit = (char >= FIRST_DIGIT) & (char < FIRST_LETTER)
        for task, argument, answer in zip(
            drawn.task_BG[row], drawn.argument_BG[row], drawn.answer_BG[row], strict=True
        ):
            if task == DIGIT:
                found = char[digit & (colour == argument)]
            else:
                found = colour[(char == argument) & (colour > 0)]
            assert found.tolist() == [answer]
    assert {*drawn.task_BG.ravel()} == {DIGIT, LETTER}


def test_short_contexts_are_half_digits_half_letters() -> None:
    drawn = draw_lookups(np.random.default_rng(1), batch=20, cells=6)
    assert ((drawn.char_BN < FIRST_LETTER).sum(axis=1) == 3).all()
    assert (drawn.colour_BN > 0).all()


def test_long_contexts_hold_what_a_picture_holds() -> None:
    drawn = draw_lookups(np.random.default_rng(1), batch=200, cells=64)
    coloured = drawn.colour_BN > 0
    assert ((coloured & (drawn.char_BN < FIRST_LETTER)).sum(axis=1) == 8).all()
    assert ((coloured & (drawn.char_BN >= FIRST_LETTER)).sum(axis=1) == 20).all()
    gray = ((drawn.char_BN > 0) & ~coloured).sum(axis=1)
    assert gray.min() < 4 and gray.max() > 32
    assert drawn.char_BN.max() < FIRST_FOIL
    where = np.argwhere(coloured & (drawn.char_BN < FIRST_LETTER))[:, 1]
    assert abs(where.mean() - 31.5) < 2  # places are shuffled


def test_one_task_alone() -> None:
    rng = np.random.default_rng(0)
    assert (draw_lookups(rng, batch=9, cells=8, tasks="digit").task_BG == DIGIT).all()
    assert (draw_lookups(rng, batch=9, cells=8, tasks="letter").task_BG == LETTER).all()


def test_the_generator_decides() -> None:
    one, two = (draw_lookups(np.random.default_rng(3), batch=5, cells=12) for _ in range(2))
    assert np.array_equal(one.char_BN, two.char_BN) and np.array_equal(one.answer_BG, two.answer_BG)
    assert not np.array_equal(one.char_BN, draw_lookups(np.random.default_rng(4), batch=5, cells=12).char_BN)


def test_answers_are_balanced() -> None:
    drawn = draw_lookups(np.random.default_rng(0), batch=4000, cells=24)
    for task, classes in ((DIGIT, 10), (LETTER, 8)):
        counts = np.bincount(drawn.answer_BG[drawn.task_BG == task])[1:]
        assert len(counts) == classes
        assert abs(counts / counts.sum() - 1 / classes).max() < 0.03


def test_impossible_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="cells=1"):
        draw_lookups(np.random.default_rng(0), batch=1, cells=1)
