"""What every dataset yields, so that training and evaluation never ask where a picture comes from."""

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
    target: str = ""
    """The one answer to learn, where the dataset names one; "" is the first of `answers`."""
    subtask: str = ""
    history: tuple[str, ...] = ()
    """The turns before in a conversation, the user's and the assistant's alternating."""
    boxes: tuple[Box, ...] = ()
    """Where the evidence is; empty when nobody knows."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """"picture" names the picture, so that samples that share one are resampled together; "place" and "entity" are
    the EntityGrid-style probe's; the rest is the dataset's."""


@runtime_checkable
class Dataset(Protocol):
    """A map-style dataset that also says how its answers are scored."""

    name: str
    split: str
    metric_names: tuple[str, ...]
    """Metrics of `experiments.metrics`; the first one is the headline."""
    max_new_tokens: int
    """Length of the answer that the model is given room for."""
    questions_per_picture: int
    """Samples i*k to i*k+k-1 share a picture; training keeps them together. 1 when there is no such order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class Traced(Protocol):
    """A dataset that knows more about where its samples came from than its config says."""

    provenance: Mapping[str, str]


@runtime_checkable
class Varied(Protocol):
    """A dataset whose samples are others in each epoch."""

    def at(self, index: int, epoch: int) -> Sample: ...


@runtime_checkable
class Listed(Protocol):
    """A dataset that has its texts at hand and can do without some of its samples."""

    dropped: Counter[str]
    """How many were left out, by reason."""

    def keep(self, fits: Callable[[Sample], bool], reason: str) -> None:
        """Drops and counts what does not fit."""


def draw_ids(ids: Sequence[str], limit: int | None, seed: int) -> frozenset[str]:
    """`limit` of the ids, the first of an order drawn with the seed: a smaller limit draws a part of a larger one's.

    All of them where there is no limit, or not that many.
    """
    if limit is None or limit >= len(ids):
        return frozenset(ids)
    order = sorted(ids)
    random.Random(seed).shuffle(order)
    return frozenset(order[:limit])


def ids_hash(ids: Iterable[str]) -> str:
    """Which samples these are: 16 hex digits of the ids in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def other_questions(samples: Sequence[Sample], seed: int) -> dict[str, str]:
    """For each sample id the question of another sample, never the same text; a function of the samples and the seed.

    Samples stand in a circle, in an order drawn by the seed; each takes the next question that is not its own.

    Raises:
        UserError: when a sample has no other question to take.
    """
    circle = sorted(samples, key=lambda s: hashlib.sha256(f"{seed}|{s.id}".encode()).digest())
    texts = [" ".join(sample.question.casefold().split()) for sample in circle]
    n, asked = len(circle), {}
    if len(set(texts)) < 2:
        raise UserError(
            "shuffle_questions=true needs different questions, and all samples ask the same: choose another dataset or "
            "a larger limit="
        )
    # From the end of the circle backwards: the next question that differs is known from the place behind.
    following = next(i for i in range(n) if texts[i] != texts[-1])
    for i in reversed(range(n)):
        after = (i + 1) % n
        following = after if texts[after] != texts[i] else following
        asked[circle[i].id] = circle[following].question
    return asked
