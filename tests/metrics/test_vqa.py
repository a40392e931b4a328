"""Soft accuracy of VQAv2 and TextVQA."""

import pytest

from experiments.metrics import metric


def test_soft_accuracy_counts_matches() -> None:
    assert metric("vqa_accuracy", few=True).score(prediction="a", references=["a"] * 3) == pytest.approx(2 / 3)
    by_matches = [
        metric("vqa_accuracy").score(prediction="red", references=["red"] * k + [str(i) for i in range(10 - k)])
        for k in range(5)
    ]
    assert by_matches == pytest.approx([0, 0.3, 0.6, 0.9, 1])


def test_textvqa_has_a_normaliser_of_its_own() -> None:
    one_comma = {"prediction": "1,000", "references": ["1000"] * 10}
    assert metric("textvqa_accuracy").score(**one_comma) == 1
    possessive = {"prediction": "dog's", "references": ["dog 's"] * 10}
    assert (metric("textvqa_accuracy").score(**possessive), metric("vqa_accuracy").score(**possessive)) == (1, 0)
