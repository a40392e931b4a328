"""Which modules a recipe means: patterns over the names of the checkpoint, of which every alternative must exist.

docs/method.md, "Recipes". Names are those below `model.` in the checkpoint ("mm_projector.0"); what a selector trains
is below "selector". A pattern that names nothing raises, so that a typing error can never train nothing.
"""

import difflib
import math
import re
from collections.abc import Sequence
from fractions import Fraction

PARTS = ("vision_tower", "mm_projector", "image_newline", "transformer", "selector")
"""What has a rank or a learning rate of its own: the first word of a name."""


def part_of(name: str) -> str:
    """The part of a name as it stands below `model.`, in the model itself, or in a training stage."""
    words = [word for word in name.split(".") if word != "model"]
    return words[0]


def check_parts(where: str, given: Sequence[str]) -> None:
    """Raises ValueError for a word that is no part of the model."""
    for part in given:
        if part not in PARTS:
            near = ", ".join(difflib.get_close_matches(part, PARTS, n=1, cutoff=0))
            raise ValueError(f"{where}.{part}: no such part, the nearest is {near}; the parts are {', '.join(PARTS)}")


def expand(pattern: str, names: Sequence[str]) -> list[str]:
    """The existing names that a pattern stands for, every alternative of it.

    `{a,b}` are alternatives, `{0-3}` a range, `{:4/26}` the first 4 of every 26 of the layers that exist there (rounded
    up), `*` every number.

    Raises:
        ValueError: when an alternative names nothing; the nearest names are listed.
    """
    heads = [""]
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if piece.startswith("{"):
            heads = [head + choice for head in heads for choice in _choices(piece[1:-1], pattern, head, names)]
        else:
            heads = [head + piece for head in heads]
    found: list[str] = []
    for concrete in heads:
        regex = re.compile(_regex(concrete))
        hits = [name for name in names if regex.fullmatch(name)]
        if not hits:
            near = ", ".join(difflib.get_close_matches(concrete, names, n=3, cutoff=0))
            raise ValueError(f"lora: {concrete!r} names nothing in this model; the nearest names are {near}")
        found += hits
    return found


def _choices(text: str, pattern: str, head: str, names: Sequence[str]) -> list[str]:
    """What stands between two braces: `a,b`, `0-3` or `:4/26`; `head` is what stands before them."""
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        if int(span[1]) > int(span[2]):
            raise ValueError(f"lora: the range {{{text}}} in {pattern!r} is empty: write the smaller number first")
        return [str(i) for i in range(int(span[1]), int(span[2]) + 1)]
    if share := re.fullmatch(r":([1-9]\d*)/([1-9]\d*)", text):
        if int(share[1]) > int(share[2]):
            raise ValueError(f"lora: the share {{{text}}} in {pattern!r} is more than all layers: give at most 1")
        layer = re.compile(_regex(head) + r"(\d+)(?:\..*)?")
        count = 1 + max((int(match[1]) for name in names if (match := layer.fullmatch(name))), default=-1)
        # Without a layer there, the message of `expand` names what is nearest.
        return [str(i) for i in range(math.ceil(count * Fraction(int(share[1]), int(share[2]))))] or [text]
    return text.split(",")


def _regex(concrete: str) -> str:
    return re.escape(concrete).replace(r"\*", r"\d+")
