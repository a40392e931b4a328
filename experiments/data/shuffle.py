"""The control of every selector that knows the question: what does it gain from the *right* one?"""

import hashlib
from collections.abc import Sequence

from experiments.data.sample import Sample


def other_questions(samples: Sequence[Sample], seed: int) -> dict[str, str]:
    """For each sample id the question of another sample, never the same text; a function of the samples and the seed.

    Samples stand in a circle, in an order drawn by the seed; each takes the next question that is not its own.

    Raises:
        ValueError: when a sample has no other question to take.
    """
    circle = sorted(samples, key=lambda s: hashlib.sha256(f"{seed}|{s.id}".encode()).digest())
    texts = [" ".join(sample.question.casefold().split()) for sample in circle]
    n, asked = len(circle), {}
    if len(set(texts)) < 2:
        raise ValueError(
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
