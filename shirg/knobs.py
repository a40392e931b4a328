"""The knobs of the gate. A choice that does not exist is refused with the choices that do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args

from shirg.coverage import ScaffoldSource
from shirg.scoring import Metric
from shirg.selection import Stage, TokenLayout

G = TypeVar("G")


def one_of(name: str, value: object, literal: Any) -> None:
    """Raises ValueError unless `value` is one of the values of a `Literal` type."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")


def group(name: str, given: Mapping[str, Any] | None, kind: type[G]) -> G:
    """The dataclass `kind` with the given fields, the others at their defaults; TypeError for an unknown field."""
    assert is_dataclass(kind)
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        raise TypeError(f"{name} has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return kind(**dict(given or {}))


NormScope = Literal["image", "view"]
Newline = Literal["none", "row"]
Underflow = Literal["global", "mask", "raise"]
CoordKind = Literal["none", "sincos_linear"]


@dataclass(frozen=True)
class Weights:
    """How much each term of the score counts."""

    similarity: float = 0.65
    neighbor: float = 0.25
    crop: float = 0.10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"weights.{name}={value}: give a number >= 0; the sign is neighbor.sign's")


@dataclass(frozen=True)
class Neighbor:
    """The neighbour term: which distance, and whether it is held against a token (-1) or for it (+1)."""

    metric: Metric = "feature_l2"
    sign: int = -1

    def __post_init__(self) -> None:
        one_of("neighbor.metric", self.metric, Metric)
        one_of("neighbor.sign", self.sign, Literal[-1, 1])


@dataclass(frozen=True)
class Scaffold:
    """The coarse picture in front: size x size means (0 for none), of what, before or after the projector.

    "auto" is 8, or the side of the base model's own pooled view where that is smaller.
    """

    size: int | Literal["auto"] = "auto"
    source: ScaffoldSource = "global"
    space: Stage = "pre"

    def __post_init__(self) -> None:
        is_side = isinstance(self.size, int) and not isinstance(self.size, bool) and self.size >= 0
        if self.size != "auto" and not is_side:
            raise ValueError(f"scaffold.size={self.size!r}: give the tokens per side, 0 for no scaffold, or auto")
        one_of("scaffold.source", self.source, ScaffoldSource)
        one_of("scaffold.space", self.space, Stage)
        if self.size == 0 and (self.source, self.space) != ("global", "pre"):
            raise ValueError("scaffold.source and scaffold.space mean nothing while scaffold.size is 0")

    def side(self, layout: TokenLayout) -> int:
        """Scaffold tokens per side on this layout."""
        return min(8, layout.pooling.side) if self.size == "auto" else self.size
