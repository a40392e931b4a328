"""A picture becomes 384-pixel views: the whole picture squashed into one, then the tiles of a letterboxed canvas.

docs/lavida.md, "Views" and "Layout". Everything here is exact: the pixel hashes are compared with the reference's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavida_adapter.config import LavidaConfig
from shirg import Pooling, Role, TokenLayout, pooled_count_B, tiles_layout

PIXEL_VALUES = ((np.arange(256) * (1 / 255)).astype(np.float32) - 0.5) / 0.5
"""float32 in [-1, 1] for each value of a pixel, rounded as the reference does: float64 first."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Views:
    """One picture, ready for the vision tower.

    Between processes it travels without its layout, which every process has one of; `geometries.ready` gives it back.
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
    """What LaViDa itself would feed for this picture; None where the layout is LaViDa's own."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "layout"}


def choose_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most of the picture's own pixels and wastes least; the first one wins ties."""
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
    """Raises ValueError for a picture that is empty or not RGB."""
    if image.mode != "RGB":
        raise ValueError(f"make_views needs an RGB picture, got mode {image.mode}: convert it first")
    if image.width < 1 or image.height < 1:
        raise ValueError(f"make_views got an empty picture of {image.width} x {image.height} pixels")


def make_views(image: Image.Image, config: LavidaConfig, *, single: bool = False) -> Views:
    """Cuts an RGB picture into views. `single` squares it with grey padding: the mode for several pictures a prompt."""
    check_picture(image)
    side = config.vision.image_size
    mode = "pad" if single else config.image_aspect_ratio
    if mode == "anyres":
        return _anyres(image, config)
    left, top, frame = 0, 0, image
    if mode == "pad":
        edge = max(image.size)
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
    return Views(pixels, layout, inside(layout, box) if mode == "pad" else everything(layout), box, image.size)


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
def _cached_layout(grid: Size, side: int, patch: int, view_px: int, pooling: Pooling) -> TokenLayout:
    return tiles_layout(grid[0], grid[1], side=side, patch_px=patch, view_px=view_px, pooling=pooling)


@lru_cache(maxsize=64)
def layout_on(layout: TokenLayout, device: torch.device) -> TokenLayout:
    """The layout on a device; moved once."""
    return layout.to(device)


def canvas_layout(config: LavidaConfig, grid: Size) -> TokenLayout:
    """The layout of a canvas of grid = (rows, columns) views; (0, 0) is the single-view mode."""
    vision = config.vision
    return _cached_layout(grid, vision.side, vision.patch_size, vision.image_size, own_pooling(config))


def own_pooling(config: LavidaConfig) -> Pooling:
    """How LaViDa itself shrinks a view (docs/lavida.md, "Pooling")."""
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
    """Tokens whose centre lies in the picture; a squashed global view has no padding unless it is the only view."""
    height, width = layout.canvas_px
    # Patch centres are whole or half pixels: back to them, so that a centre on the border is no matter of rounding.
    centre_N2 = (layout.centre_N2.double() * torch.tensor([width, height]) * 2).round() / 2
    x, y = centre_N2.unbind(-1)
    left, top, right, bottom = (round(edge * px, 6) for edge, px in zip(box, (width, height) * 2, strict=True))
    inside_N = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    return inside_N if layout.canvas == (0, 0) else inside_N | (layout.role_N == Role.GLOBAL)


def everything(layout: TokenLayout) -> Tensor:
    """bool [N]: no token is padding."""
    return torch.ones(layout.n_tokens, dtype=torch.bool)
