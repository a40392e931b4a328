"""Wrong use of the metrics: each case raises UserError with a sentence that has these words."""

from collections.abc import Callable

import pytest
import torch

from experiments.metrics import cider_d, metric
from experiments.metrics.answers import text_metrics
from experiments.metrics.recall import target_tokens
from shirg import UserError

CASES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "unknown metric": (lambda: metric("bleu"), ["'bleu' does not exist", "anls, cider_d, entity_match", "_clean"]),
    "no cleaned recall": (lambda: metric("entity_recall_clean"), ["'entity_recall_clean' does not exist"]),
    "no metric of answers": (lambda: text_metrics(["entity_recall"]), ["scores no answers", "exact_match"]),
    "corpus metric first": (lambda: text_metrics(["cider_d", "anls"]), ["cider_d depends on all answers", "first"]),
    "three people": (
        lambda: metric("vqa_accuracy").score(prediction="a", references=["a"] * 3),
        ["answers of 4 or more people", "a sample has 3", "data.metrics=[exact_match]"],
    ),
    "corpus without references": (lambda: cider_d([(["a"], [])]), ["needs a reference for every item"]),
    "all tokens are padding": (
        lambda: target_tokens([(0.0, 0.0, 0.5, 0.5)], torch.rand(4, 4), torch.zeros(4, dtype=torch.bool)),
        ["no token is eligible"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str) -> None:
    wrong, words = CASES[case]
    with pytest.raises(UserError) as error:
        wrong()
    assert [word for word in words if word not in str(error.value)] == []
