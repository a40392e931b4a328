"""Samples and datasets: the one form that training and evaluation read, and how subsets of samples are drawn."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from shirg import UserError

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) as fractions of the picture, origin at the top left."""


MOST_CHARACTERS = 200_000
"""Longest text of a sample. Tokenizers need gigabytes for one of megabytes, which no model could read anyway."""


def check_texts(texts: Iterable[str], where: str) -> None:
    """Refuses texts that no tokenizer should get.

    Raises:
        UserError: a text is too long, or has half a character (a lone surrogate); `where` names its place.
    """
    for text in texts:
        if len(text) > MOST_CHARACTERS:
            raise UserError(
                f"{where}: a text of {len(text):,} characters; give at most {MOST_CHARACTERS:,}, or remove the row"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{where}: half a character in {text[:40]!a}; write it again in UTF-8")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one picture."""

    id: str
    """Unique in its dataset and the same in every run."""
    dataset: str
    split: str
    load_image: Callable[[], Image.Image]
    """Decodes or draws the picture: RGB, upright. Can be pickled, for worker processes."""
    size: tuple[int, int] | None
    """(width, height) in pixels where it is known without decoding."""
    question: str
    prompt: str
    """What the model is asked: the question and the dataset's own suffix."""
    answers: tuple[str, ...]
    """Accepted answers, in the dataset's order."""
    draft: str = ""
    """A text with gaps that the model fills instead of answering freely (`lavida_adapter.infill`); "" for none."""
    target: str = ""
    """The one answer to learn, where the dataset names one."""
    subtask: str = ""
    history: tuple[str, ...] = ()
    """The earlier turns of a conversation, the user's and the assistant's alternating."""
    boxes: tuple[Box, ...] = ()
    """Where the evidence is; empty when unknown."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """"picture" names the picture: samples that share it are resampled together. "place" and "entity" belong to
    EntityGrid-style questions. Other keys are the dataset's own."""

    @property
    def to_learn(self) -> str:
        """The answer that training learns: the target, else the first answer that is not blank; "" where all are."""
        return next((text for text in (self.target, *self.answers) if text.strip()), "")


@runtime_checkable
class Dataset(Protocol):
    """A map-style dataset with the metrics and the answer length of its questions."""

    name: str
    split: str
    metric_names: tuple[str, ...]
    """Metrics of `experiments.metrics`; the first one is the headline."""
    max_new_tokens: int
    """Longest answer in tokens."""
    questions_per_picture: int
    """Samples i*k to i*k+k-1 share a picture; training keeps them together. 1 when there is no such order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class Traced(Protocol):
    """A dataset that records where its samples came from, beyond what its config says."""

    provenance: Mapping[str, str]


@runtime_checkable
class Ruled(Protocol):
    """A dataset that says which part of a generated text is the answer."""

    answer_rule: str
    """A rule of `experiments.metrics.final_answer`."""


@runtime_checkable
class Varied(Protocol):
    """A dataset whose samples differ between epochs."""

    def at(self, index: int, epoch: int) -> Sample: ...


@runtime_checkable
class Listed(Protocol):
    """A dataset that can check its texts without decoding pictures, and drop some of its samples."""

    dropped: Counter[str]
    """Number of dropped samples by reason."""

    def keep(self, fits: Callable[[Sample], bool], reason: str) -> None:
        """Drops the samples that do not fit, and counts them in `dropped`."""


class SampleList:
    """The base class of datasets that hold their samples in a list; a `Listed` one."""

    questions_per_picture = 1

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def keep(self, fits: Callable[[Sample], bool], reason: str) -> None:
        samples = [sample for sample in self._samples if fits(sample)]
        if lost := len(self._samples) - len(samples):
            self.dropped[reason] += lost
        self._samples = samples


@runtime_checkable
class Ranked(Protocol):
    """A dataset that finds a sample by the rank of its id, without making all samples."""

    def at_rank(self, rank: int) -> int:
        """The index of the sample whose id is number `rank` among all ids in sorted order."""


def draw_ids(ids: Sequence[str], limit: int | None, seed: int) -> frozenset[str]:
    """The first `limit` ids of an order drawn with the seed: a smaller limit draws a subset of a larger one's.

    All ids if there is no limit or if there are not that many.
    """
    if limit is None or limit >= len(ids):
        return frozenset(ids)
    order = sorted(ids)
    return frozenset(order[rank] for rank in draw_ranks(len(ids), limit, seed))


def draw_ranks(n: int, limit: int, seed: int) -> list[int]:
    """The ranks that the ids of `draw_ids` have among n sorted ids."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order[:limit]


def ids_hash(ids: Iterable[str]) -> str:
    """Identifies a set of samples: 16 hex digits of the hash of the ids in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def other_questions(samples: Sequence[Sample], seed: int) -> dict[str, str]:
    """For each sample id the question of another sample, never the same text; a function of the samples and the seed.

    The samples form a circle in an order drawn by the seed; each takes the next question whose text differs.

    Raises:
        UserError: all questions have the same text.
    """
    circle = sorted(samples, key=lambda s: hashlib.sha256(f"{seed}|{s.id}".encode()).digest())
    texts = [" ".join(sample.question.casefold().split()) for sample in circle]
    n, asked = len(circle), {}
    if len(set(texts)) < 2:
        raise UserError(
            "shuffle_questions=true needs different questions, and all samples ask the same: choose another dataset or "
            "a larger limit="
        )
    # Backwards, so that the next question with another text is known from the step before.
    following = next(i for i in range(n) if texts[i] != texts[-1])
    for i in reversed(range(n)):
        after = (i + 1) % n
        following = after if texts[after] != texts[i] else following
        asked[circle[i].id] = circle[following].question
    return asked
