"""Pictures cut in other ways than LaViDa's: the notes' canvases (docs/method.md, "Geometries").

Sizes follow the tower's own view: a canvas of 7/4 of it (672 pixels for 384), a foveal view of 7/6 of it (448), a
single view of 7/4 or of 4/3 (512).
"""

import math
from dataclasses import replace
from functools import lru_cache

from PIL import Image

from lavida_adapter.config import LavidaConfig, VisionConfig
from lavida_adapter.views import (
    Views,
    check_picture,
    everything,
    inside,
    letterbox_box,
    make_views,
    own_layout,
    own_pooling,
    pooled_count,
    to_tensor,
)
from shirg import Geometry, Pooling, TokenLayout, crops_layout, fovea_layout, most_pooled, single_layout, tiles_layout

CANVAS, FOVEA = (7, 4), (7, 6)
"""Sizes as ratios to the tower's view."""
SINGLE_VIEW: dict[Geometry, tuple[int, int]] = {"single_672": CANVAS, "single_512": (4, 3)}
"""Geometries of one squashed view, and its size."""


def cells_of(vision: VisionConfig, ratio: tuple[int, int]) -> int:
    """Whole patches along a canvas whose side is `ratio` of a view's: 48 for (7, 4), 36 for (4, 3) of 384 pixels."""
    return ratio[0] * vision.image_size // (ratio[1] * vision.patch_size)


def cut(image: Image.Image, config: LavidaConfig, geometry: Geometry) -> Views:
    """The views of an RGB picture on a geometry: LaViDa's own, or one of the notes'."""
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
        # The middle of the letterboxed canvas; what of the picture does not fit in is seen by the other view alone.
        left, top = left - (whole - edge) // 2, top - (whole - edge) // 2
        views = [squash(image, edge), _pasted(scaled, left, top, edge, edge)]
    else:
        px, patch = config.vision.image_size, config.vision.patch_size
        origins = layout.cell_N2.unflatten(0, (-1, layout.side**2))[:, 0].tolist()
        # A crop at the far edge reaches over it by what a view has beyond its last patch, which no token sees.
        views = [_pasted(scaled, left - col * patch, top - row * patch, px, px) for row, col in origins]
    box = (left / edge, top / edge, (left + width) / edge, (top + height) / edge)
    return Views(to_tensor(views), layout, inside(layout, box), box, size, count)


def ready(picture: Image.Image | Views, config: LavidaConfig, geometry: Geometry) -> Views:
    """The views of a picture, cut now or, in training, ahead of time and perhaps in another process.

    Raises:
        ValueError: for views of another geometry.
    """
    if not isinstance(picture, Views):
        return cut(picture, config, geometry)
    own = geometry == "lavida_tiles"
    layout = own_layout(picture.size, config) if own else geometry_layout(config, geometry)
    if len(picture.valid_N) != layout.n_tokens or getattr(picture, "layout", layout) is not layout:
        raise ValueError(
            f"a picture was cut for another geometry than {geometry}: cut it for the selector that it meets"
        )
    return replace(picture, layout=layout)


def squash(image: Image.Image, edge: int) -> Image.Image:
    """The whole picture in a square of `edge` pixels, whatever its proportions."""
    return image.resize((edge, edge), Image.Resampling.BICUBIC)


def _pasted(picture: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    frame = Image.new("RGB", (width, height), (0, 0, 0))
    frame.paste(picture, (left, top))
    return frame


def geometry_layout(config: LavidaConfig, geometry: Geometry) -> TokenLayout:
    """The one layout that every picture has on a geometry of the notes."""
    vision = config.vision
    own = own_pooling(config)
    canvases = config.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else ((0, 0),)
    most = _most(tuple(canvases), vision.image_size, vision.patch_size, own)
    return _layout(geometry, vision, own, most)


@lru_cache(maxsize=16)
def _most(canvases: tuple[tuple[int, int], ...], view_px: int, patch: int, pooling: Pooling) -> int:
    """The largest number of tokens that the base model feeds, over its canvases."""
    side = view_px // patch
    grids = {(height // view_px, width // view_px) for width, height in canvases}
    return max(most_pooled(tiles_layout(*grid, side, patch, view_px, pooling)) for grid in grids)


@lru_cache(maxsize=16)
def _layout(geometry: Geometry, vision: VisionConfig, own: Pooling, most: int) -> TokenLayout:
    patch = vision.patch_size
    if geometry == "fovea":
        cells = cells_of(vision, FOVEA)
        return fovea_layout(cells, patch, _pooling(own, cells, most))
    if geometry in SINGLE_VIEW:
        cells = cells_of(vision, SINGLE_VIEW[geometry])
        return single_layout(cells, patch, _pooling(own, cells, most), geometry)
    cells = cells_of(vision, CANVAS)
    return crops_layout(cells, vision.side, patch, _pooling(own, vision.side, most))


def _pooling(own: Pooling, side: int, most: int) -> Pooling:
    """The base model's way of pooling a view of another side, and its largest count as the yardstick."""
    pooled = math.ceil(side / 2) if own.mode == "bilinear" else side // 2
    return Pooling(side=pooled, mode=own.mode, merge=own.merge, most=most)
