"""The base class of synthetic datasets: pictures are drawn by number, and consecutive questions share a picture.

Nothing is drawn before it is needed: a sample's question and its place in the order of ids need its own scene alone,
and its pixels are drawn when they are loaded.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

from experiments.data.sample import Sample
from shirg import UserError

BUCKETS = {"train": range(0, 80), "val": range(80, 90), "test": range(90, 100)}
"""The hash of a picture's content, modulo 100, decides the one split that it may appear in."""
MOST = 2_000_000
CACHED_SCENES = 64
"""How many scenes a process keeps, because consecutive samples share one."""
CACHED_ATTEMPTS = 2**15
"""Of how many scenes a process keeps the number of the draw that fell into the split: of "test" every tenth does."""


class SyntheticDataset:
    """`n` questions in all, `qa_per_image` about each picture; a subclass makes the sample of a number."""

    name: str

    def __init__(self, *, split: str, n: int, qa_per_image: int, max_new_tokens: int, metrics: Sequence[str]) -> None:
        if split not in BUCKETS:
            raise UserError(f"data.split={split!r} does not exist: choose one of {', '.join(BUCKETS)}")
        if n < 1 or qa_per_image < 1:
            raise UserError(f"data.n={n} and data.qa_per_image={qa_per_image} must be positive")
        if n > MOST:
            raise UserError(f"data.n={n} is too many to draw: give at most {MOST:,}")
        self.split = split
        self.metric_names = tuple(metrics)
        self.max_new_tokens = max_new_tokens
        self.questions_per_picture = qa_per_image
        self._n = n

    def sample(self, picture: int, turn: int) -> Sample:
        """The sample of question number `turn` about picture number `picture`, both from 0."""
        raise NotImplementedError(f"{type(self).__name__} must make the sample of a number")

    def picture_id(self, picture: int) -> str:
        """The name of a picture; the ids of its samples are this, "-" and the question."""
        raise NotImplementedError(f"{type(self).__name__} must name its pictures")

    def at_rank(self, rank: int) -> int:
        """The index of the sample whose id is number `rank` in sorted order; draws the scene of its picture alone."""
        k = self.questions_per_picture
        missing = -self._n % k  # questions that the last picture has fewer than the others
        if missing and rank >= self._pictures.index(self._n // k) * k + k - missing:
            rank += missing
        first = self._pictures[rank // k] * k
        ids = [self[i].id for i in range(first, min(first + k, self._n))]
        if len(set(ids)) < len(ids):
            raise UserError(f"data: {self.name} has two samples with the same id, so answers are ambiguous")
        return first + ids.index(sorted(ids)[rank % k])

    @cached_property
    def _pictures(self) -> list[int]:
        """The pictures in the order of their samples' ids."""
        return sorted(range(-(-self._n // self.questions_per_picture)), key=lambda i: self.picture_id(i) + "-")

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._n:
            raise IndexError(f"sample {index} of {self._n}")
        return self.sample(*divmod(index, self.questions_per_picture))


def densities_of(density: str | Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Densities from a list or a text with commas.

    Raises:
        UserError: the list is empty, names a density twice, or names one that does not exist.
    """
    found = tuple(part.strip() for part in density.split(",")) if isinstance(density, str) else tuple(density)
    for unknown in set(found).difference(known):
        raise UserError(f"data.density={unknown!r} does not exist: choose from {', '.join(known)}")
    if not found or len(set(found)) != len(found):
        raise UserError(f"data.density={list(found)} must name one or more different densities")
    return found
