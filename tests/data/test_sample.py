"""Which answer is learned; another sample's question: never the same text, and a function of samples and seed."""

from dataclasses import replace

import pytest

from experiments.data.sample import Sample, other_questions


def samples(*questions: str) -> list[Sample]:
    return [
        Sample(
            id=f"s{i}", dataset="d", split="s", load_image=lambda: None, size=None, question=q, prompt=q, answers=("a",)
        )
        for i, q in enumerate(questions)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_question_is_another_one_of_the_same_dataset(seed: int) -> None:
    asked = samples("red?", "red?", "Red? ", "blue?", "red?", "green?", "red?")
    got = other_questions(asked, seed)
    assert got.keys() == {s.id for s in asked} and set(got.values()) <= {s.question for s in asked}
    for sample in asked:
        assert got[sample.id].strip().lower() != sample.question.strip().lower()
    assert got == other_questions(asked[::-1], seed)


@pytest.mark.parametrize(
    ("target", "answers", "learned"),
    [
        ("", ("7", "seven"), "7"),
        ("", ("", "42"), "42"),
        ("", (" \n", "", " 42 "), " 42 "),
        ("seven", ("", "7"), "seven"),
        (" ", ("7",), "7"),
        ("", ("", " "), ""),
        ("", (), ""),
    ],
)
def test_a_blank_answer_is_not_learned(target: str, answers: tuple[str, ...], learned: str) -> None:
    (sample,) = samples("how many?")
    assert replace(sample, target=target, answers=answers).to_learn == learned


def test_the_seed_draws_the_order() -> None:
    asked = samples(*(f"question {i}" for i in range(30)))
    draws = [other_questions(asked, seed) for seed in range(2)]
    assert draws[0] != draws[1]
    assert len(set(draws[0].values())) == 30, "with all texts different each question is used once"
