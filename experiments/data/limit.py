"""A part of a dataset that does not depend on the order of its files."""

import hashlib
import random
from collections.abc import Iterable, Sequence


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
