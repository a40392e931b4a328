"""Questions about glyphs, in pictures and in text contexts, have one answer, which the question does not give away."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from experiments.data.synthetic.glyphs import GlyphScene, ask, draw_lookups, draw_scene, questions
from experiments.data.synthetic.glyphs.questions import DIGIT, LETTER
from experiments.data.synthetic.glyphs.scene import (
    CHARS,
    COLOURS,
    DIGITS,
    FIRST_DIGIT,
    FIRST_FOIL,
    FIRST_LETTER,
    LETTERS,
    SHAPES,
)


def every_question(scene: GlyphScene) -> list[str]:
    letters = [text for text in LETTERS if (scene.char_RC[scene.colour_RC > 0] == CHARS.index(text)).sum() == 1]
    return [f"digit {c}" for c in COLOURS[1:]] + [f"letter {c}" for c in letters] + ["shape kind", "shape colour"]


@pytest.mark.parametrize("density", ["sparse", "dense", "hard"])
def test_answer_and_box_agree_with_the_scene(density: str) -> None:
    for index in range(10):
        scene = draw_scene(0, "train", index, density)
        texts = every_question(scene)
        assert len(texts) == 8 + (12 if density == "hard" else 20) + 2
        for text in texts:
            question = ask(scene, *text.split())
            assert question.text == text
            x0, y0, x1, y1 = (int(16 * edge) for edge in question.box)
            assert 0 <= x0 < x1 <= 16 and 0 <= y0 < y1 <= 16
            task, argument = text.split()
            if task == "shape":
                assert (x1 - x0, y1 - y0) == (4, 4)
                assert question.answer in (SHAPES if argument == "kind" else COLOURS)
                assert question.group == "guard" and question.subtask == f"shape_{argument}"
                continue
            assert (x1 - x0, y1 - y0) == (1, 1)
            assert question.group == "fine" and question.subtask == task
            shown = CHARS[scene.char_RC[y0, x0]], COLOURS[scene.colour_RC[y0, x0]]
            assert shown == ((question.answer, argument) if task == "digit" else (argument, question.answer))


def test_a_second_candidate_is_an_error() -> None:
    scene = draw_scene(0, "train", 0, "sparse")
    free = tuple(np.argwhere((scene.char_RC == 0) & (scene.colour_RC == 0))[0])
    for char, text in ((FIRST_DIGIT, "digit red"), (CHARS.index("K"), "letter K")):
        char_RC, colour_RC = scene.char_RC.copy(), scene.colour_RC.copy()
        char_RC[free], colour_RC[free] = char, COLOURS.index("red")
        with pytest.raises(ValueError, match=f"'{text}' must have exactly one answer; this scene has 2"):
            ask(GlyphScene(char_RC, colour_RC, scene.shapes, look=0), *text.split())
    with pytest.raises(ValueError, match="'shape kind' needs exactly one big shape; this scene has 2"):
        ask(GlyphScene(scene.char_RC, scene.colour_RC, scene.shapes * 2, look=0), "shape", "kind")
    with pytest.raises(ValueError, match="this scene has 0"):
        ask(GlyphScene(0 * scene.char_RC, 0 * scene.colour_RC, scene.shapes, look=0), "digit", "red")


def test_questions_take_turns_and_fewer_are_a_prefix_of_more() -> None:
    scene = draw_scene(0, "train", 5, "dense")
    six = questions(scene, n=6)
    assert [q.subtask.split("_")[0] for q in six] == ["digit", "letter", "shape"] * 2
    assert len({q.text for q in six}) == 6
    assert questions(scene, n=3) == six[:3]
    letters = questions(scene, n=20, tasks=("letter",))
    assert sorted(q.text for q in letters) == sorted(f"letter {c}" for c in LETTERS)


def test_hard_pictures_are_asked_about_their_keys() -> None:
    scene = draw_scene(0, "train", 5, "hard")
    assert len({q.text for q in questions(scene, n=12, tasks=("letter",))}) == 12


def test_the_question_alone_gives_nothing_away() -> None:
    """The best guess from the question's text is within 3 points of chance."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(500):
        scene = draw_scene(0, "train", index, "sparse")
        for text in every_question(scene):
            seen[text][ask(scene, *text.split()).answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(300):
        scene = draw_scene(0, "test", index, "sparse")
        for text in every_question(scene):
            question = ask(scene, *text.split())
            right[question.subtask].append(seen[text].most_common(1)[0][0] == question.answer)
    assert np.mean(right["digit"]) < 1 / len(DIGITS) + 0.03
    assert np.mean(right["letter"]) < 1 / 8 + 0.03
    assert np.mean(right["shape_kind"]) < 1 / 3 + 0.06  # 300 questions only
    assert np.mean(right["shape_colour"]) < 1 / 8 + 0.06


@pytest.mark.parametrize("cells", [2, 6, 7, 24, 64, 100])
def test_every_question_of_a_context_has_one_answer(cells: int) -> None:
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


def test_answers_of_contexts_are_balanced() -> None:
    drawn = draw_lookups(np.random.default_rng(0), batch=4000, cells=24)
    for task, classes in ((DIGIT, 10), (LETTER, 8)):
        counts = np.bincount(drawn.answer_BG[drawn.task_BG == task])[1:]
        assert len(counts) == classes
        assert abs(counts / counts.sum() - 1 / classes).max() < 0.03
