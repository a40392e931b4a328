"""Training one adapter for several budgets or resolutions (docs/method.md, "Recipes")."""

import random
from dataclasses import dataclass

from shirg import Selector


@dataclass(frozen=True)
class SelectorSchedule:
    """Which selector a training step uses: a function of seed and step alone, so the same on every process.

    `turns` are taken one after the other, and within a turn one of its selectors is drawn.
    """

    turns: tuple[tuple[Selector, ...], ...]

    def at(self, seed: int, step: int) -> Selector:
        turn = self.turns[step % len(self.turns)]
        return turn[random.Random(f"{seed}|mix|{step}").randrange(len(turn))]
