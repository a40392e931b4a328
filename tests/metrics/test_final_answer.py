"""The answer in a longer text, on many shapes of output."""

import pytest

from experiments.metrics.final_answer import AnswerRule, Extracted, check_rule, extract


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The bars sum to 42.\nAnswer: 42", "42"),
        ("Answer: 42\n", "42"),
        ("answer : 42 %", "42 %"),
        ("ANSWER:\t3.5 million", "3.5 million"),
        ("Final Answer: blue", "blue"),
        ("**Answer:** 42", "42"),
        ("**Answer**: 42", "42"),
        ("**Answer: 42**", "42"),
        ("So the answer is clear. Answer: yes. Done", "yes. Done"),
        ("Answer: 41. No, I misread.\nAnswer: 42", "42"),
        ("First answer: 41, second answer: 42\nThat is all.", "42"),
        ("Answer:\n\n  42\nThanks", "42"),
        ("Answer: a: b", "a: b"),
        ("答案 Answer：东京", "东京"),
        ("Answer: 42\r\nmore", "42"),
        ("reason\nAnswer: [1, 2]", "[1, 2]"),
    ],
)
def test_what_follows_the_last_mark(text: str, answer: str) -> None:
    assert extract("final", text) == Extracted(answer, True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", ""),
        ("  \n ", ""),
        ("42", "42"),
        ("I count seven.\n\nSo it is seven.\n", "So it is seven."),
        ("The answer is 42", "The answer is 42"),
        ("Answers: 1 and 2", "Answers: 1 and 2"),
        ("nonanswer: 3", "nonanswer: 3"),
        ("It is 41.\nAnswer:", ""),
        ("Answer: 41\nAnswer: **", ""),
    ],
)
def test_texts_without_a_final_answer_are_marked(text: str, answer: str) -> None:
    assert extract("final", text) == Extracted(answer, False)


def test_the_other_rules() -> None:
    text = "It is 7.\nAnswer: 7"
    assert extract("whole", text) == Extracted(text, None)
    assert extract("gaps", text, ["7", "red"]) == Extracted("7 red", True)
    assert extract("gaps", text) == Extracted(text, False)


def test_rules_are_known_by_name() -> None:
    rules: list[AnswerRule] = ["whole", "final", "gaps"]
    assert [check_rule(rule) for rule in rules] == rules
    with pytest.raises(ValueError, match="data.answer_rule='last': choose one of whole, final, gaps"):
        check_rule("last")
