"""CIDEr-D (Vedantam et al., 2015): n-grams weighted by how rare they are in the whole evaluated set.

A score depends on the whole set: it cannot be averaged over batches, and values of different subsets cannot be
compared. All answers are therefore scored together. A right answer of one word scores 2.5 of 10, so the score is
reported beside its ceiling, the score of a perfect predictor on the same set.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.metrics.answer_metric import AnswerMetric, clean_answer
from shirg import UserError

ORDERS = 4
SIGMA = 6.0
TOP = 10.0
TOKENISER = "plain/1"
"""Name and version, stored in every result."""

_TOKEN = re.compile(r"[-+]?(?=\d)(?:[\w'’./:+-]|(?<=\d),(?=\d))*[\w+]|[^\W_](?:[\w'’./:+-]*[\w+])?|[%$€£¥#&]")

Tokens = Sequence[str]
Item = tuple[Tokens, Sequence[Tokens]]
"""A prediction and its references."""
Grams = list[Counter[tuple[str, ...]]]
"""Counts of n-grams for n = 1 to 4."""


def tokenise(text: str) -> list[str]:
    """Lower-case words and numbers; %, currency and # are words of their own, other punctuation is dropped.

    It needs no Java and agrees with the Penn Treebank tokeniser on answers. It leaves clitics ("it's", "cannot")
    whole, drops brackets and the last period of abbreviations, and keeps the euro sign.
    """
    return _TOKEN.findall(text.lower())


def cider_d(items: Iterable[Item]) -> list[float]:
    """The score of each item in [0, 10], with document frequencies of these items' references.

    Every item needs a reference; a perfect answer scores 10 only from four words on, and 0 where every item has its
    words. The items are read twice.
    """
    corpus = _Corpus(references for _, references in items)
    return [corpus.score(prediction, references) for prediction, references in items]


def ceiling(items: Iterable[Item]) -> float:
    """The corpus score of a predictor that always gives one of the references, the best one."""
    corpus = _Corpus(references for _, references in items)
    best = math.fsum(max(corpus.score(r, references) for r in references) for _, references in items)
    return best / corpus.n


class _Corpus:
    def __init__(self, references: Iterable[Sequence[Tokens]]) -> None:
        self.frequency: Counter[tuple[str, ...]] = Counter()
        self.n = 0
        for item in references:
            if not item:
                raise UserError("CIDEr-D needs a reference for every item; leave out those without")
            self.frequency.update({gram for text in item for counts in _grams(text) for gram in counts})
            self.n += 1
        self.log_n = math.log(self.n) if self.n else 0.0

    def score(self, prediction: Tokens, references: Sequence[Tokens]) -> float:
        return TOP * sum(self._similarity(_grams(prediction), _grams(r)) for r in references) / len(references)

    def _similarity(self, guess: Grams, truth: Grams) -> float:
        """Mean over orders of the clipped cosine, times a penalty on the difference in length."""
        # Lengths are counted in bigrams, as the reference implementation does.
        apart = sum(guess[1].values()) - sum(truth[1].values())
        penalty = math.exp(-(apart**2) / (2 * SIGMA**2))
        return sum(map(self._cosine, guess, truth)) * penalty / ORDERS

    def _cosine(self, guess: Counter[tuple[str, ...]], truth: Counter[tuple[str, ...]]) -> float:
        ours, theirs = self._weights(guess), self._weights(truth)
        dot = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        return dot / norm if norm else 0.0

    def _weights(self, counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: n * (self.log_n - math.log(max(1, self.frequency[gram]))) for gram, n in counts.items()}


def _grams(tokens: Tokens) -> Grams:
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


@dataclass(frozen=True)
class _Items:
    """The tokens of answers and their references, made again each time they are read; items without references are
    left out.
    """

    predictions: Iterable[str]
    references: Iterable[Sequence[str]]
    clean: bool

    def __iter__(self) -> Iterator[Item]:
        for prediction, accepted in zip(self.predictions, self.references, strict=True):
            if accepted:
                yield self._tokens(prediction), [self._tokens(reference) for reference in accepted]

    def _tokens(self, text: str) -> list[str]:
        return tokenise(clean_answer(text) if self.clean else text)


class CiderD(AnswerMetric):
    """CIDEr-D of a whole evaluation; samples without references are left out."""

    def scores(self, predictions: Iterable[str], references: Iterable[Sequence[str]]) -> list[float | None]:
        """Each sample's score in the corpus of them all; None for a sample without references."""
        values = iter(cider_d(_Items(predictions, references, self.clean)))
        return [next(values) if accepted else None for accepted in references]

    def facts(self, predictions: Iterable[str], references: Iterable[Sequence[str]]) -> dict[str, Any]:
        """The corpus score, and the numbers that are needed to interpret it (ceiling, size, tokeniser)."""
        items = _Items(predictions, references, self.clean)
        scores = cider_d(items)
        if not scores:
            return {}
        score, best = math.fsum(scores) / len(scores), ceiling(items)
        lengths = Counter(len(text) for _, accepted in items for text in accepted)
        return {
            "score": score,
            "top": TOP,
            "ceiling": best,
            "normalised": score / best if best else None,
            "n": len(scores),
            "reference_tokens": sum(n * count for n, count in lengths.items()) / lengths.total(),
            "tokeniser": TOKENISER,
        }
