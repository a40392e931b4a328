"""From a picture to the views of the vision tower: LaViDa's own tiling, then the other geometries.

LaViDa's views (docs/lavida.md, "Views" and "Layout") are the whole picture resized to 384 pixels, then the tiles of a
letterboxed canvas. They are exact: tests compare pixel hashes with the reference. The other geometries are described in
docs/method.md.

Shape letters: V views, S pixels a side, N source tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavida_adapter.config import LavidaConfig, VisionConfig
from shirg import (
    Geometry,
    Pooling,
    Role,
    TokenLayout,
    UserError,
    crops_layout,
    fovea_layout,
    least_pooled,
    most_pooled,
    pooled_count_B,
    single_layout,
    tiles_layout,
)

PIXEL_VALUES = ((np.arange(256) * (1 / 255)).astype(np.float32) - 0.5) / 0.5
"""float32 in [-1, 1] for each pixel value; computed in float64 and then rounded, as in the reference."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Views:
    """One picture, ready for the vision tower.

    Pickled without its layout, of which every process has its own copy; `ready` puts it back.
    """

    pixels_V3SS: Tensor
    """float32 in [-1, 1]: base view first, then the tiles row by row."""
    layout: TokenLayout
    valid_N: Tensor
    """bool: False where a token's centre lies in letterbox padding."""
    picture_4: tuple[float, float, float, float]
    """The picture's box on the canvas, as fractions of the canvas."""
    size: Size
    """(width, height) of the original picture."""
    base_count: int | None = None
    """How many tokens LaViDa itself would feed for this picture; None if the layout is LaViDa's own."""

    @property
    def matched_count(self) -> int:
        """How many tokens LaViDa itself would feed for this picture."""
        return _pooled_count(self.layout, self.size) if self.base_count is None else self.base_count

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "layout"}


def content_key(picture: Image.Image | Views) -> bytes:
    """A digest of what a picture shows: the same in processes that each load it for themselves."""
    if isinstance(picture, Views):
        facts, pixels = repr((picture.size, picture.picture_4)), picture.pixels_V3SS.numpy().tobytes()
    else:
        facts, pixels = repr((picture.size, picture.mode)), picture.tobytes()
    return blake2b(pixels, key=blake2b(facts.encode()).digest(), digest_size=16).digest()


def choose_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most of the picture's pixels, then the one with the least padding, then the first."""
    w, h = size
    best, best_area, best_waste = canvases[0], -1, 0
    for canvas_w, canvas_h in canvases:
        scale = min(canvas_w / w, canvas_h / h)
        area = min(int(w * scale) * int(h * scale), w * h)
        waste = canvas_w * canvas_h - area
        if area > best_area or (area == best_area and waste < best_waste):
            best, best_area, best_waste = (canvas_w, canvas_h), area, waste
    return best


def letterbox_box(size: Size, canvas: Size) -> tuple[int, int, int, int]:
    """Where the resized picture is pasted: left, top, width, height in canvas pixels."""
    (w, h), (canvas_w, canvas_h) = size, canvas
    scale_w, scale_h = canvas_w / w, canvas_h / h
    if scale_w < scale_h:
        new_w, new_h = canvas_w, min(math.ceil(h * scale_w), canvas_h)
    else:
        new_w, new_h = min(math.ceil(w * scale_h), canvas_w), canvas_h
    return (canvas_w - new_w) // 2, (canvas_h - new_h) // 2, new_w, new_h


def check_picture(image: Image.Image) -> None:
    """Raises UserError for a picture that is empty or not RGB."""
    if image.mode != "RGB":
        raise UserError(f"make_views needs an RGB picture, got mode {image.mode}: convert it first")
    if image.width < 1 or image.height < 1:
        raise UserError(f"make_views got an empty picture of {image.width} x {image.height} pixels")


MOST_PADDED = 2**27
"""Pixels of a picture with its padding; a longer one is made smaller first."""


def make_views(image: Image.Image, config: LavidaConfig, *, single: bool = False) -> Views:
    """Cuts an RGB picture into LaViDa's views. `single`: one view with grey padding, for several pictures a prompt."""
    check_picture(image)
    side = config.vision.image_size
    mode = "pad" if single else config.image_aspect_ratio
    if mode == "anyres":
        return _anyres(image, config)
    left, top, frame, size = 0, 0, image, image.size
    if mode == "pad":
        edge = max(image.size)
        if edge**2 > MOST_PADDED:  # a strip of 60,000 pixels would be padded to 10 GiB
            edge = math.isqrt(MOST_PADDED)
            scale = edge / max(image.size)
            image = image.resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        left, top = (edge - image.width) // 2, (edge - image.height) // 2
        frame = Image.new("RGB", (edge, edge), (127, 127, 127))
        frame.paste(image, (left, top))
    layout = canvas_layout(config, (0, 0))
    box = (
        left / frame.width,
        top / frame.height,
        (left + image.width) / frame.width,
        (top + image.height) / frame.height,
    )
    pixels = to_tensor([frame.resize((side, side), Image.Resampling.BICUBIC)])
    return Views(pixels, layout, inside(layout, box) if mode == "pad" else everything(layout), box, size)


def _anyres(image: Image.Image, config: LavidaConfig) -> Views:
    side = config.vision.image_size
    canvas_w, canvas_h = choose_canvas(image.size, config.image_grid_pinpoints)
    left, top, new_w, new_h = letterbox_box(image.size, (canvas_w, canvas_h))
    canvas = Image.new("RGB", (canvas_w, canvas_h), (0, 0, 0))
    canvas.paste(image.resize((new_w, new_h), Image.Resampling.BICUBIC), (left, top))
    base = image.resize((side, side), Image.Resampling.BICUBIC)
    tiles = [
        canvas.crop((x, y, x + side, y + side)) for y in range(0, canvas_h, side) for x in range(0, canvas_w, side)
    ]
    layout = canvas_layout(config, (canvas_h // side, canvas_w // side))
    box = (left / canvas_w, top / canvas_h, (left + new_w) / canvas_w, (top + new_h) / canvas_h)
    return Views(to_tensor([base, *tiles]), layout, inside(layout, box), box, image.size)


def to_tensor(views: Sequence[Image.Image]) -> Tensor:
    """uint8 RGB -> float32 [V, 3, S, S] in [-1, 1]."""
    pixels = np.stack([np.asarray(view, dtype=np.uint8) for view in views])
    return torch.from_numpy(PIXEL_VALUES.take(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))


def patch_pixels(pixels_V3SS: Tensor, layout: TokenLayout) -> Tensor:
    """The pixels [N, 3, p, p] of each token's patch."""
    patch = round(float(layout.size_N2[-1, 0]) * layout.canvas_px[1])
    seen = layout.side * patch
    grid = pixels_V3SS[..., :seen, :seen].unfold(2, patch, patch).unfold(3, patch, patch)
    return grid.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


@lru_cache(maxsize=64)
def _cached_layout(grid: Size, side: int, patch: int, view_px: int, pooling: Pooling, base: int) -> TokenLayout:
    layout = tiles_layout(grid[0], grid[1], side=side, patch_px=patch, view_px=view_px, pooling=pooling)
    return replace(layout, base_budget=base)


@lru_cache(maxsize=64)
def layout_on(layout: TokenLayout, device: torch.device) -> TokenLayout:
    """The layout on a device; copied once."""
    return layout.to(device)


def canvas_layout(config: LavidaConfig, grid: Size) -> TokenLayout:
    """The layout of a canvas of grid = (rows, columns) views; (0, 0) is the single-view mode."""
    vision = config.vision
    base = config.budgets["base"]
    return _cached_layout(grid, vision.side, vision.patch_size, vision.image_size, own_pooling(config), base)


def own_pooling(config: LavidaConfig) -> Pooling:
    """How LaViDa itself pools a view (docs/lavida.md, "Pooling")."""
    return Pooling(side=config.pooled_side, mode=config.mm_spatial_pool_mode, merge=config.mm_patch_merge_type)


def own_layout(size: Size, config: LavidaConfig) -> TokenLayout:
    """The layout that LaViDa itself gives a picture of this size."""
    grid = (0, 0)
    if config.image_aspect_ratio == "anyres":
        width, height = choose_canvas(size, config.image_grid_pinpoints)
        grid = (height // config.vision.image_size, width // config.vision.image_size)
    return canvas_layout(config, grid)


def pooled_count(size: Size, config: LavidaConfig) -> int:
    """How many tokens LaViDa itself feeds for a picture of this size, newlines included."""
    return _pooled_count(own_layout(size, config), size)


@lru_cache(maxsize=4096)
def _pooled_count(layout: TokenLayout, size: Size) -> int:
    return int(pooled_count_B(layout, torch.tensor([size])))


def inside(layout: TokenLayout, box: tuple[float, float, float, float]) -> Tensor:
    """bool [N]: tokens whose centre lies in the picture. All tokens of a global view do, unless it is the only view.

    A picture that lies between two rows or columns of centres has those that are nearest to it: a strip of one pixel
    is seen by the tokens that it crosses.
    """
    height, width = layout.canvas_px
    # Patch centres are whole or half pixels; rounding to them makes a centre on the border exact.
    centre_N2 = (layout.centre_N2.double() * torch.tensor([width, height]) * 2).round() / 2
    x, y = centre_N2.unbind(-1)
    left, top, right, bottom = (round(edge * px, 6) for edge, px in zip(box, (width, height) * 2, strict=True))
    inside_N = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    if layout.canvas != (0, 0):
        inside_N |= layout.role_N == Role.GLOBAL
    if bool(inside_N.any()):
        return inside_N
    away_N = torch.stack([left - x, x - right, top - y, y - bottom]).clamp_min(0).square().sum(0)
    return away_N == away_N.min()


def everything(layout: TokenLayout) -> Tensor:
    """bool [N]: no token is padding."""
    return torch.ones(layout.n_tokens, dtype=torch.bool)


CANVAS, FOVEA = (7, 4), (7, 6)
"""Canvas sizes as ratios to the tower's view."""
SINGLE_VIEW: dict[Geometry, tuple[int, int]] = {"single_672": CANVAS, "single_512": (4, 3)}
"""Geometries of one view that shows the whole picture, and its size as a ratio to the tower's view."""


def cells_of(vision: VisionConfig, ratio: tuple[int, int]) -> int:
    """Whole patches along a canvas whose side is `ratio` of a view's: 48 for (7, 4), 36 for (4, 3) of 384 pixels."""
    return ratio[0] * vision.image_size // (ratio[1] * vision.patch_size)


def cut(image: Image.Image, config: LavidaConfig, geometry: Geometry) -> Views:
    """The views of an RGB picture in a geometry: LaViDa's own or another one."""
    if geometry == "lavida_tiles":
        return make_views(image, config)
    check_picture(image)
    layout = geometry_layout(config, geometry)
    size, edge = image.size, layout.canvas_px[0]
    count = pooled_count(size, config)
    if geometry in SINGLE_VIEW:
        views, box = [squash(image, edge)], (0.0, 0.0, 1.0, 1.0)
        return Views(to_tensor(views), layout, everything(layout), box, size, count)
    whole = cells_of(config.vision, CANVAS) * config.vision.patch_size
    left, top, width, height = letterbox_box(size, (whole, whole))
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    if geometry == "fovea":
        # The middle of the letterboxed canvas; the rest of the picture is seen by the other view only.
        left, top = left - (whole - edge) // 2, top - (whole - edge) // 2
        views = [squash(image, edge), _pasted(scaled, left, top, edge, edge)]
    else:
        px, patch = config.vision.image_size, config.vision.patch_size
        origins = layout.cell_N2.unflatten(0, (-1, layout.side**2))[:, 0].tolist()
        # A view is larger than its patches: a crop at the far edge extends over it by pixels that no token sees.
        views = [_pasted(scaled, left - col * patch, top - row * patch, px, px) for row, col in origins]
    box = (left / edge, top / edge, (left + width) / edge, (top + height) / edge)
    return Views(to_tensor(views), layout, inside(layout, box), box, size, count)


def ready(picture: Image.Image | Views, config: LavidaConfig, geometry: Geometry) -> Views:
    """The views of a picture: cut now, or cut before by a worker process in training.

    Raises:
        UserError: for views of another geometry.
    """
    if not isinstance(picture, Views):
        return cut(picture, config, geometry)
    own = geometry == "lavida_tiles"
    layout = own_layout(picture.size, config) if own else geometry_layout(config, geometry)
    if len(picture.valid_N) != layout.n_tokens or getattr(picture, "layout", layout) is not layout:
        raise UserError(f"a picture was cut for another geometry than {geometry}: cut it for the selector that is used")
    return replace(picture, layout=layout)


def squash(image: Image.Image, edge: int) -> Image.Image:
    """The whole picture resized to a square of `edge` pixels."""
    return image.resize((edge, edge), Image.Resampling.BICUBIC)


def _pasted(picture: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    frame = Image.new("RGB", (width, height), (0, 0, 0))
    frame.paste(picture, (left, top))
    return frame


def geometry_layout(config: LavidaConfig, geometry: Geometry) -> TokenLayout:
    """The layout of every picture in a geometry other than LaViDa's own."""
    vision = config.vision
    own = own_pooling(config)
    canvases = config.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else ((0, 0),)
    least, most = _counts(tuple(canvases), vision.image_size, vision.patch_size, own)
    pooling = replace(own, side=config.pooled(_side(geometry, vision)), most=most, least=least)
    return _cached_geometry(geometry, vision, pooling, config.budgets["base"])


@lru_cache(maxsize=16)
def _cached_geometry(geometry: Geometry, vision: VisionConfig, pooling: Pooling, base: int) -> TokenLayout:
    return replace(_layout(geometry, vision, pooling), base_budget=base)


@lru_cache(maxsize=16)
def _counts(canvases: tuple[tuple[int, int], ...], view_px: int, patch: int, pooling: Pooling) -> tuple[int, int]:
    """The smallest and the largest number of tokens that the base model feeds, over its canvases."""
    side = view_px // patch
    grids = {(height // view_px, width // view_px) for width, height in canvases}
    layouts = [tiles_layout(*grid, side, patch, view_px, pooling) for grid in grids]
    return min(map(least_pooled, layouts)), max(map(most_pooled, layouts))


def _side(geometry: Geometry, vision: VisionConfig) -> int:
    """Tokens per side of a view in a geometry other than LaViDa's own."""
    if geometry == "fovea":
        return cells_of(vision, FOVEA)
    return cells_of(vision, SINGLE_VIEW[geometry]) if geometry in SINGLE_VIEW else vision.side


def _layout(geometry: Geometry, vision: VisionConfig, pooling: Pooling) -> TokenLayout:
    side, patch = _side(geometry, vision), vision.patch_size
    if geometry == "fovea":
        return fovea_layout(side, patch, pooling)
    if geometry in SINGLE_VIEW:
        return single_layout(side, patch, pooling, geometry)
    return crops_layout(cells_of(vision, CANVAS), side, patch, pooling)
