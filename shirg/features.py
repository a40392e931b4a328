"""What a selector sees: the layout of the tokens of a canvas, and their vision features.

docs/method.md, "The contract". Shape letters: B batch, V views, N source tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, Self

import torch
from torch import Tensor

from shirg.validation import UserError

Geometry = Literal["lavida_tiles", "seed_canvas48", "single_672", "single_512", "fovea"]
"""How a picture is cut into views (docs/method.md, "Geometries")."""


class Role(IntEnum):
    """What a source token's view shows."""

    GLOBAL = 0
    """The whole picture, squashed into one view."""
    TILE = 1
    """One cell of the canvas; tiles do not overlap."""
    CROP = 2
    """A window of the canvas that may overlap others."""


@dataclass(frozen=True)
class Pooling:
    """How the base model itself shrinks its views; matched budgets follow from it (docs/lavida.md, "Pooling")."""

    side: int
    """A view of n x n tokens becomes side x side; side = n where the base model does not pool."""
    mode: Literal["bilinear", "average", "max"] = "bilinear"
    merge: Literal["spatial_unpad", "flat"] = "spatial_unpad"
    most: int | None = None
    """The base model's largest count over its own canvases; None where the layout is itself one of them."""
    least: int = 0
    """The least one; it counts where `most` is given."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Position and size of each of the N source tokens of one canvas kind; the same for every picture on that canvas.

    Frames: a GLOBAL token is placed in the picture (the global view is the picture, squashed); a TILE or CROP token is
    placed on the canvas, where `VisionFeatures.picture_B4` is the part that is not letterbox padding.
    """

    view_N: Tensor
    """int64: index of the view."""
    role_N: Tensor
    """int64: a `Role`."""
    cell_N2: Tensor
    """int64: (row, column) in the view for GLOBAL, on the canvas for TILE and CROP."""
    centre_N2: Tensor
    """float32: (x, y) of the token's centre as a fraction of its frame."""
    size_N2: Tensor
    """float32: (width, height) of the token as a fraction of its frame."""
    canvas: tuple[int, int]
    """(rows, columns) of the canvas in cells; (0, 0) when there is only a global view."""
    view_shape: tuple[int, int]
    """(rows, columns) of tokens of one view; all views of a layout have the same."""
    pooling: Pooling | None
    """None where the base model's pooling is not known, or where it does not pool."""
    canvas_px: tuple[int, int]
    """(height, width) of the canvas in pixels; the size of the single view when there are no tiles."""
    geometry: Geometry = "lavida_tiles"
    """How the picture was cut into views; a selector refuses any other geometry than its own."""
    base_budget: int | None = None
    """How many tokens the base model nominally uses, for `budget="base"`; None where it is not known."""
    rank_N: Tensor = field(init=False)
    """int64: rank of each token in reading order: global view first, then the canvas row by row."""
    order_N: Tensor = field(init=False)
    """int64: the token at each rank; the inverse of `rank_N`."""
    n_global: int = field(init=False)
    """How many tokens the global view has; in reading order the canvas comes after them."""
    derived: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    """Tables that selectors compute from the layout. Kept here, because torch.compile cannot trace a weak map."""
    overlaps: bool = field(init=False)
    """Whether several tokens share a canvas cell."""

    def __repr__(self) -> str:
        (rows, cols), n_tiles = self.view_shape, self.n_views - bool(self.n_global)
        parts = ["1 global view"] if self.n_global else []
        parts += [f"{n_tiles} tile{'s' * (n_tiles > 1)}"] if n_tiles else []
        canvas = "" if self.canvas == (0, 0) else f", canvas {self.canvas[0]} x {self.canvas[1]}"
        return f"TokenLayout({self.n_tokens} tokens: {' and '.join(parts)} of {rows} x {cols}{canvas}, {self.geometry})"

    def __post_init__(self) -> None:
        # A layout outlives the call that built it, so its tensors must be usable in training and inference alike.
        with torch.inference_mode(False):
            is_global = self.role_N.cpu() == int(Role.GLOBAL)
            row, col = self.cell_N2.cpu().to(torch.int64).unbind(-1)
            height, width = (max(view, canvas) for view, canvas in zip(self.view_shape, self.canvas, strict=True))
            key = row * width + col + torch.where(is_global, 0, width * height)
            order = torch.argsort(key, stable=True)
            object.__setattr__(self, "order_N", order.to(self.view_N.device))
            object.__setattr__(self, "rank_N", torch.argsort(order).to(self.view_N.device))
            object.__setattr__(self, "n_global", int(is_global.sum()))
            object.__setattr__(self, "overlaps", bool((torch.sort(key).values.diff() == 0).any()))

    @property
    def n_tokens(self) -> int:
        return self.view_N.shape[0]

    @property
    def n_views(self) -> int:
        return self.n_tokens // self.view_tokens

    @property
    def view_tokens(self) -> int:
        return self.view_shape[0] * self.view_shape[1]

    @property
    def side(self) -> int:
        """Tokens per side of one view; raises UserError where views are not square."""
        rows, cols = self.view_shape
        if rows != cols:
            raise UserError(
                f"views of {rows} x {cols} tokens are not square, and this method or option is defined on square views "
                "alone; choose another one"
            )
        return rows

    @property
    def known_pooling(self) -> Pooling:
        """How the base model pools its views; raises UserError where that is not known."""
        if self.pooling is None:
            raise UserError(
                "these features do not say how the base model pools its views: give the budget as a number, choose a "
                "selector that does not pool as the base model does, or pass pooling=shirg.Pooling(side=...)"
            )
        return self.pooling

    @property
    def finest(self) -> tuple[slice, tuple[int, int]]:
        """The finest grid, the canvas or the only view: which of the grid cells it has, and its rows and columns."""
        if self.canvas == (0, 0):
            return slice(0, None), self.view_shape
        return slice(self.n_global, None), self.canvas

    def to(self, device: torch.device | str) -> Self:
        target = torch.device(device)
        current = self.view_N.device
        if current.type == target.type and target.index in (None, current.index):
            return self
        with torch.inference_mode(False):
            given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
            moved: dict[str, Any] = {k: v.to(target) if isinstance(v, Tensor) else v for k, v in given.items()}
            return type(self)(**moved)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device; the host does not wait for what runs there, such as the vision tower.

    From ordinary memory a GPU takes 64 KiB without a wait, from pinned memory any size.
    """
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@dataclass(frozen=True)
class PictureCounts:
    """What is known of one picture on the host, beside `n_valid`, so that no selector has to wait for the device."""

    base: int | None
    """Tokens that the base model would use for it, whatever the geometry is; None where that is not known."""
    rows: int
    """Rows of the canvas that hold a valid token; 1 where there is no canvas."""
    joinable: int
    """How many cells of the finest grid can join a neighbour (docs/method.md, "Merging")."""
    doubled: int
    """Valid tokens beyond the first of each cell that others can join; 0 where views do not overlap."""


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """The vision tower's output for B pictures that share one canvas kind."""

    tokens_BND: Tensor
    """Encoder states for a selector of stage "pre", projected states for stage "post"."""
    layout: TokenLayout
    valid_BN: Tensor
    """bool: False where the token's centre lies in letterbox padding."""
    picture_B4: Tensor
    """float32: the picture's box (x0, y0, x1, y1) as fractions of the canvas."""
    size_B2: Tensor
    """int64: (width, height) of the original picture in pixels."""
    ids: tuple[str, ...]
    """Stable sample ids: the only seed a random control may use."""
    n_valid: tuple[int, ...]
    """Valid tokens per picture, known on the host, so that no selector has to wait for the device."""
    counts: tuple[PictureCounts, ...] | None = None
    """More that is known on the host (`shirg.picture_counts`); None where nothing more is: then the worst is assumed,
    and a picture may be refused that would fit."""
    picture_at: tuple[int, ...] | None = None
    """Rows with the same number show the same picture, with different questions; None when all may differ."""
    relevance_BN: Tensor | None = None
    base_count_B: Tensor | None = None
    """int64: how many tokens the base model would use for each picture; None where that follows from the layout."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Extra recordings that the selector asked for by name in `needs`; "encoder" is the pre-projector states."""
    boxes: tuple[tuple[tuple[float, float, float, float], ...], ...] | None = None
    """Where the evidence of each sample is, as fractions of the picture; only an oracle may read it."""

    def __repr__(self) -> str:
        least, most = min(self.n_valid, default=0), max(self.n_valid, default=0)
        return (
            f"VisionFeatures(tokens {list(self.tokens_BND.shape)} {self.tokens_BND.dtype}, "
            f"valid {least if least == most else f'{least} to {most}'}, "
            f"relevance {'none' if self.relevance_BN is None else 'given'}, "
            f"taps {', '.join(sorted(self.taps)) or 'none'}, {self.layout!r})"
        )

    def box_BN4(self) -> Tensor:
        """Each token's box (x0, y0, x1, y1) as fractions of the original picture; outside [0, 1] in padding."""
        half = self.layout.size_N2 / 2
        box_N4 = torch.cat([self.layout.centre_N2 - half, self.layout.centre_N2 + half], dim=-1)
        origin = self.picture_B4[:, None, :2]
        extent = self.picture_B4[:, None, 2:] - origin
        on_canvas = (box_N4[None] - origin.repeat(1, 1, 2)) / extent.repeat(1, 1, 2)
        if self.layout.canvas == (0, 0):  # a single view carries its own padding
            return on_canvas
        is_global = (self.layout.role_N == int(Role.GLOBAL))[None, :, None]
        return torch.where(is_global, box_N4[None], on_canvas)

    def __getitem__(self, rows: slice) -> Self:
        """The features of some of the pictures."""
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "taps":
                picked[f.name] = {k: v[rows] for k, v in value.items()}
            else:
                picked[f.name] = value if f.name == "layout" or value is None else value[rows]
        return replace(self, **picked)
