"""CIDEr-D of short answers: scores, ceiling, and its dependence on the whole set."""

import pytest

from experiments.metrics import CiderD, cider_d, metric
from experiments.metrics.cider_d import ceiling, tokenise


def corpus(*pairs: tuple[str, str]) -> list[tuple[list[str], list[list[str]]]]:
    return [(guess.split(), [truth.split()]) for guess, truth in pairs]


@pytest.mark.parametrize(("words", "score"), [(1, 2.5), (2, 5.0), (3, 7.5), (4, 10.0), (6, 10.0)])
def test_a_right_answer_scores_by_its_length(words: int, score: float) -> None:
    answers = [" ".join(f"w{i}{k}" for k in range(words)) for i in range(3)]
    items = corpus(*((answer, answer) for answer in answers))
    assert cider_d(items) == pytest.approx([score] * 3)
    assert ceiling(items) == pytest.approx(score)


def test_on_one_word_answers_it_is_exact_match_and_nothing_else() -> None:
    items = corpus(("12", "12"), ("44519", "44518"), ("yes", "yes"), ("", "no"))
    assert cider_d(items) == pytest.approx([2.5, 0, 2.5, 0])
    assert ceiling(items) == 2.5


def test_one_item_alone_scores_nothing() -> None:
    assert cider_d(corpus(("red", "red"))) == [0]
    assert cider_d(corpus(("red", "red"), ("red", "red"))) == [0, 0]


def test_the_ceiling_takes_the_best_reference() -> None:
    items = [(["x"], [["a"], ["b", "c", "d", "e"]]), (["y"], [["f"]])]
    perfect = [(["b", "c", "d", "e"], items[0][1]), (["f"], items[1][1])]
    assert ceiling(items) == pytest.approx(sum(cider_d(perfect)) / 2)


def test_scores_and_facts_of_a_set() -> None:
    scorer = metric("cider_d")
    assert isinstance(scorer, CiderD)
    assert scorer.scores(["yes", "63%", "?"], [["yes"], ["63%"], []]) == pytest.approx([2.5, 5.0, None])
    facts = scorer.facts(["Yes", "63 %", "naïve"], [["yes"], ["63%"], []])
    assert [facts[key] for key in ("score", "ceiling", "normalised")] == pytest.approx([3.75, 3.75, 1.0])
    facts = scorer.facts(["yes", "63%", "?"], [["yes"], ["64%"], []])
    assert (facts["n"], facts["tokeniser"], facts["reference_tokens"]) == (2, "plain/1", 1.5)
    assert scorer.facts(["a"], [["a"]])["normalised"] is None
    with pytest.raises(ValueError, match="zip"):
        scorer.scores(["a", "b"], [["a"]])


def test_cleaned_answers() -> None:
    raw, clean = (
        metric(name).scores(["The answer is 1,000.", "no"], [["1000"], ["no"]]) for name in ("cider_d", "cider_d_clean")
    )
    assert raw[0] == 0 and clean[0] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("63%", ["63", "%"]),
        ("-1,234.50", ["-1,234.50"]),
        ("cat,dog", ["cat", "dog"]),
        ("(2010-2015).", ["2010-2015"]),
        ("€5", ["€", "5"]),
        ("... !?", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenise(text) == tokens
