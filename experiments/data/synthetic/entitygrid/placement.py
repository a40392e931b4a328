"""Places of entities: at the centre of a slice, on the boundary of two slices, or where four slices meet.

A canvas is cut into rows x cols slices. Its anchors are the centres of the slices and all points where a boundary
meets a centre line or another boundary: nine for 2 x 2.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from experiments.data.sample import Box
from experiments.data.synthetic.entitygrid.draw import mask_of
from experiments.data.synthetic.entitygrid.entities import BLACK, COLOUR_RGB, Entity, foils
from shirg import UserError

PLACES = ("centre", "edge", "junction")
NEAR = "near"
"""The place of an entity that jitter has moved off a boundary, so that too little of it is on the other side."""
SPLIT_SHARE = 0.35
"""Least share of an entity's box on each side of a boundary for it to count as cut."""
ROWS, COLS = ("top", "centre", "bottom"), ("left", "centre", "right")

Pixels = tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """A picture's size in pixels and the slices that it will be cut into."""

    width: int
    height: int
    rows: int
    cols: int

    @property
    def slice_px(self) -> tuple[float, float]:
        return self.width / self.cols, self.height / self.rows


@dataclass(frozen=True)
class Anchor:
    """A point for an entity, in pixels, with the axes on which it lies on a boundary."""

    x: float
    y: float
    on_x: bool
    on_y: bool

    @property
    def place(self) -> str:
        return PLACES[self.on_x + self.on_y]


@dataclass(frozen=True)
class PlacedEntity:
    entity: Entity
    size: int
    box: Pixels


@dataclass(frozen=True)
class EntityScene:
    """Everything that a picture shows; the same scene is the same pixels."""

    canvas: Canvas
    placed: tuple[PlacedEntity, ...]
    noise: float
    look: int
    """Seed of the noise."""


def anchors(canvas: Canvas) -> list[Anchor]:
    """All anchors in reading order."""
    xs, ys = _stops(canvas.width, canvas.cols), _stops(canvas.height, canvas.rows)
    return [Anchor(x, y, on_x, on_y) for (y, on_y), (x, on_x) in product(ys, xs)]


def _stops(length: int, slices: int) -> list[tuple[float, bool]]:
    """Positions along an axis, and whether each is a boundary (else it is a centre)."""
    return [(length * k / (2 * slices), k % 2 == 0) for k in range(1, 2 * slices)]


def put(entity: Entity, size: int, anchor: Anchor, jitter: int) -> PlacedEntity:
    """The entity at an anchor; jitter moves it away from boundaries, to the right and down."""
    width, height = mask_of(entity, size).size
    x = anchor.x + jitter * anchor.on_x - width / 2
    y = anchor.y + jitter * anchor.on_y - height / 2
    return PlacedEntity(entity, size, (round(x), round(y), round(x) + width, round(y) + height))


def place_of(placed: PlacedEntity, anchor: Anchor) -> str:
    """The anchor's place if each of its boundaries cuts the entity; else `NEAR`."""
    x0, y0, x1, y1 = placed.box
    shares = [(anchor.x - x0) / (x1 - x0)] * anchor.on_x + [(anchor.y - y0) / (y1 - y0)] * anchor.on_y
    return anchor.place if all(SPLIT_SHARE <= share <= 1 - SPLIT_SHARE for share in shares) else NEAR


def alone(
    canvas: Canvas, entity: Entity, size: int, anchor: Anchor, jitter: int, noise: float, seed: str
) -> EntityScene:
    """One entity and nothing else."""
    return EntityScene(canvas, (put(entity, size, anchor, jitter),), noise, _digest(seed))


def counted(
    canvas: Canvas,
    entity: Entity,
    count: int,
    split: str,
    size: int,
    anchor: Anchor,
    jitter: int,
    noise: float,
    seed: str,
) -> EntityScene:
    """The entity `count` times, among others of its family; one of them, or for 0 another entity, is at the anchor.

    The others are at the centres of slices.
    """
    wanted = [entity] * count + foils(entity, split, 3 - count)
    placed = [put(wanted[0], size, anchor, jitter)]
    centres = [a for a in anchors(canvas) if a.place == "centre"]
    random.Random(f"{seed}|centres").shuffle(centres)
    for centre in centres:
        if len(placed) == len(wanted):
            break
        candidate = put(wanted[len(placed)], size, centre, 0)
        if not any(_overlap(candidate.box, p.box) for p in placed):
            placed.append(candidate)
    if len(placed) < max(2, count):
        raise UserError(
            f"a canvas of {canvas.width}x{canvas.height} pixels in {canvas.rows}x{canvas.cols} slices has no room for "
            f"two entities of {size} pixels: take a larger data.canvas or smaller data.sizes"
        )
    return EntityScene(canvas, tuple(placed), noise, _digest(seed))


def cell_of(anchor: Anchor, canvas: Canvas) -> str | None:
    """The cell of a 3 x 3 grid that the anchor lies in, in words; None near a line of that grid."""
    shares = (3 * anchor.x / canvas.width, 3 * anchor.y / canvas.height)
    if any(0 < round(share) < 3 and abs(share - round(share)) < 0.125 for share in shares):
        return None
    column, row = (min(2, int(share)) for share in shares)
    return " ".join(dict.fromkeys((ROWS[row], COLS[column])))


def fraction(box: Pixels, canvas: Canvas) -> Box:
    x0, y0, x1, y1 = box
    return (x0 / canvas.width, y0 / canvas.height, x1 / canvas.width, y1 / canvas.height)


def render(scene: EntityScene) -> Image.Image:
    """The picture, RGB."""
    canvas = scene.canvas
    picture = Image.new("RGB", (canvas.width, canvas.height), "white")
    for placed in scene.placed:
        colour = COLOUR_RGB[placed.entity.colour] if placed.entity.colour else BLACK
        picture.paste(colour, placed.box[:2], mask_of(placed.entity, placed.size))
    if not scene.noise:
        return picture
    noise_HW = np.random.default_rng(scene.look).normal(0, scene.noise, (canvas.height, canvas.width))
    noisy = np.asarray(picture, dtype=np.float64) + noise_HW[..., None]
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _overlap(a: Pixels, b: Pixels) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _digest(seed: str) -> int:
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
