"""The entities that are shown: coloured shapes, characters, short strings and icons, divided by split.

An entity belongs to one split, so that a model trained on one has never seen the entities of another.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from shirg import UserError

SHAPES = (
    *("circle", "square", "triangle", "diamond", "pentagon", "hexagon"),
    *("star", "cross", "heart", "crescent", "arrow", "ring"),
)
ICONS = ("house", "tree", "key", "cup", "fish", "boat", "flag", "sun", "umbrella", "ladder", "mushroom", "bell")
COLOUR_RGB = {
    "red": (214, 39, 40),
    "green": (34, 139, 34),
    "blue": (31, 80, 200),
    "orange": (255, 140, 0),
    "purple": (128, 0, 160),
    "brown": (120, 72, 40),
    "pink": (240, 110, 180),
    "gray": (110, 110, 110),
}
BLACK = (20, 20, 20)
"""The ink of everything but shapes."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
FAMILIES = ("shape", "character", "string", "icon")
STRING_LENGTHS = (3, 6)
STRINGS = 48
"""Strings of a split."""

SPLITS = {"train": (0.0, 1 / 3), "val": (1 / 3, 2 / 3), "test": (2 / 3, 1.0)}
"""The part of each family that a split has; of twelve icons four, enough for a question with four options."""


@dataclass(frozen=True, order=True)
class Entity:
    """Something to be found, named and counted."""

    family: str
    kind: str
    colour: str = ""
    """"" for all but shapes."""

    @property
    def name(self) -> str:
        """Its name in an answer."""
        return f"{self.colour} {self.kind}".strip()

    @property
    def phrase(self) -> str:
        """Its name in a question, after "the"."""
        if self.family == "character":
            return f"{'digit' if self.kind in DIGITS else 'letter'} {self.kind}"
        return f'text "{self.kind}"' if self.family == "string" else self.name

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.kind, self.phrase) if self.family == "character" else (self.name,)

    @property
    def counted(self) -> str:
        """The question that counts it."""
        if self.family in ("shape", "icon"):
            return f"How many {self.name}{'es' if self.kind.endswith(('s', 'sh')) else 's'} are there?"
        return f"How many times is the {self.phrase} shown?"


@lru_cache
def family_of(split: str, family: str) -> tuple[Entity, ...]:
    """The entities of a split in one family, in a fixed order that no seed changes."""
    if family == "string":
        return tuple(Entity("string", text) for text in islice(_strings(split), STRINGS))
    every = {
        "shape": [Entity("shape", kind, colour) for kind in SHAPES for colour in COLOUR_RGB],
        "character": [Entity("character", c) for c in LETTERS + DIGITS],
        "icon": [Entity("icon", kind) for kind in ICONS],
    }[family]
    random.Random(f"entities|{family}").shuffle(every)
    begin, end = (round(share * len(every)) for share in SPLITS[split])
    return tuple(every[begin:end])


def choose(split: str, n: int, seed: int) -> list[Entity]:
    """n entities of the split, drawn with the seed, the families in turn.

    Raises:
        UserError: the split has fewer.
    """
    queues = [list(family_of(split, family)) for family in FAMILIES]
    for queue in queues:
        random.Random(f"{seed}|{split}|{queue[0].family}").shuffle(queue)
    if not 1 <= n <= (total := sum(map(len, queues))):
        raise UserError(f"data.entities={n}: the split {split} has 1 to {total} entities")
    chosen: list[Entity] = []
    while len(chosen) < n:
        chosen += [queue.pop(0) for queue in queues if queue][: n - len(chosen)]
    return chosen


def foils(entity: Entity, split: str, n: int) -> list[Entity]:
    """n other entities of its family and split, those that share its kind or colour first, always the same ones."""
    others = [other for other in family_of(split, entity.family) if other != entity]
    random.Random(f"foils|{entity.name}").shuffle(others)
    others.sort(key=lambda other: not (other.kind == entity.kind or (other.colour and other.colour == entity.colour)))
    return others[:n]


def _strings(split: str) -> Iterator[str]:
    """Strings that hash into the split; a letter comes first, so that none is a number."""
    draw = random.Random("entities|string")
    low, high = SPLITS[split]
    while True:
        length = draw.randint(*STRING_LENGTHS)
        text = draw.choice(LETTERS) + "".join(draw.choices(LETTERS + DIGITS, k=length - 1))
        bucket = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if low <= int.from_bytes(bucket, "big") / 2**64 < high:
            yield text
