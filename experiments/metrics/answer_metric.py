"""Answers without the wrapping that a metric would trip over; scored beside the raw text, never instead of it."""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

CLEANER = "clean_answer/1"
"""Name and version; results carry it. Change the number with the rules."""

_LEAD = re.compile(r"^(?:the answer is|answer is|answer)\s*:?\s+|^answer:", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"[$€£¥₹]\s*(?=[-+]?[\d.])|(?<=\d)\s*[$€£¥₹]")


def clean_answer(text: str) -> str:
    """The text without a leading "the answer is" or "answer:", one pair of quotes around it, one trailing period,
    commas between thousands, and currency signs next to a number.

    A percent sign stays: without it the value would be another. Numbers keep their digits and signs.
    """
    text = _LEAD.sub("", text.strip()).strip()
    text = _unquote(text)
    if text.endswith(".") and not text.endswith(".."):
        text = _unquote(text[:-1].rstrip())
    return _CURRENCY.sub("", _THOUSANDS.sub("", text)).strip()


def _unquote(text: str) -> str:
    quoted = len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]
    return text[1:-1].strip() if quoted else text


class Gathered(Metric):
    """A metric whose states are lists of tensors, one entry for each update, which all ranks exchange at the end."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, **dtypes: torch.dtype) -> None:
        super().__init__()
        self._dtypes = dtypes
        for name in dtypes:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For a rank that saw nothing torchmetrics would send floats, whatever the others send.
        for name, dtype in self._dtypes.items():
            if not getattr(self, name):
                setattr(self, name, [torch.zeros(0, dtype=dtype, device=self.device)])
        super()._sync_dist(*args, **kwargs)

    def record(self, **entries: Tensor) -> None:
        """Appends to the states."""
        for name, entry in entries.items():
            getattr(self, name).append(entry.to(self.device))

    def state(self, name: str) -> Tensor:
        """All entries of a state in one tensor."""
        value = getattr(self, name)
        if isinstance(value, list) and not value:
            return torch.zeros(0, dtype=self._dtypes[name], device=self.device)
        return dim_zero_cat(value)


class SampleMean(Gathered):
    """Mean of per-sample scores; samples without a score (None) are left out, never counted as 0.

    A sample that was scored twice, as a distributed sampler pads with repetitions, counts once. `compute` is NaN when
    no sample had a score.
    """

    def __init__(self) -> None:
        super().__init__(key=torch.int64, value=torch.float64)

    def add(self, ids: Sequence[str], scores: Sequence[float | None]) -> None:
        pairs = [(key_of(i), score) for i, score in zip(ids, scores, strict=True) if score is not None]
        keys, values = zip(*pairs, strict=True) if pairs else ((), ())
        self.record(key=torch.tensor(keys, dtype=torch.int64), value=torch.tensor(values, dtype=torch.float64))

    def compute(self) -> Tensor:
        keys, values = self.state("key").tolist(), self.state("value").tolist()
        once = dict(zip(reversed(keys), reversed(values), strict=True))  # of repetitions, the first
        mean = math.fsum(once.values()) / len(once) if once else math.nan
        return torch.tensor(mean, dtype=torch.float64, device=self.device)


def key_of(sample_id: str) -> int:
    """63 bits of an id's digest: ranks exchange tensors, not texts."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big") >> 1


class TextMetric(SampleMean):
    """A metric that compares an answer with its references.

    Args:
        clean: compare what `clean_answer` leaves of the answer and of the references.
    """

    reference: ClassVar[Literal["answers", "target"]] = "answers"
    """Whether a sample's accepted answers are the references, or only its target."""

    def __init__(self, *, clean: bool = False) -> None:
        super().__init__()
        self.clean = clean

    def score(self, *, prediction: str, references: Sequence[str]) -> float | None:
        """Score of one answer; None when there is nothing to compare it with."""
        if self.clean:
            return self.compare(clean_answer(prediction), [clean_answer(reference) for reference in references])
        return self.compare(prediction, references)

    def compare(self, prediction: str, references: Sequence[str]) -> float | None:
        """The score of texts as they are."""
        raise NotImplementedError

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]], ids: Sequence[str]) -> None:
        pairs = zip(predictions, references, strict=True)
        self.add(ids, [self.score(prediction=prediction, references=accepted) for prediction, accepted in pairs])
