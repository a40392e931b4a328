"""Vision features to test selectors with: real canvas geometry at a small side, random or given tokens."""

from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg import (
    Geometry,
    Pooling,
    Role,
    Selection,
    Selector,
    Source,
    TokenLayout,
    VisionFeatures,
    crops_layout,
    fovea_layout,
    picture_counts,
    pooled_count_B,
    single_layout,
    tiles_layout,
)

# (rows, columns) of tiles: LaViDa's five canvases, and a single view.
GRIDS = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1), (0, 0)]
PADDED = (-1, -1)
"""Stands for a single view with padding, as LaViDa's mode `pad` makes it."""
# Pictures that LaViDa puts on each canvas, two with letterbox padding and one that is long and thin.
SIZES = {
    (2, 1): [(400, 800), (300, 300), (120, 400)],
    (1, 2): [(800, 400), (500, 375), (380, 200)],
    (2, 2): [(768, 768), (640, 480), (2480, 3508)],
    (1, 3): [(1000, 280), (1152, 384), (3000, 700)],
    (3, 1): [(220, 900), (384, 1152), (700, 3000)],
    (0, 0): [(384, 384), (640, 480), (100, 300)],
    PADDED: [(384, 384), (640, 480), (480, 640)],
}
PATCH = 14


def layout_of(grid: tuple[int, int], side: int = 9, **pooling: Any) -> TokenLayout:
    """Views of side * 14 + 6 pixels, so that 27 gives LaViDa's 384 and every side has its blind margin."""
    kind = Pooling(**{"side": ceil(side / 2), **pooling})
    rows, cols = (max(n, 0) for n in grid)
    return tiles_layout(rows, cols, side=side, patch_px=PATCH, view_px=side * PATCH + 6, pooling=kind)


def geometry_layout(geometry: Geometry, side: int = 9) -> TokenLayout:
    """A layout of the notes for views of side x side patches: a canvas of 7/4 of them, a fovea of 7/6."""
    cells = {"single_672": 7 * side // 4, "fovea": 7 * side // 6}.get(geometry, side)
    pooled = ceil(side / 2)
    kind = Pooling(side=ceil(cells / 2), most=5 * pooled**2 + 2 * pooled, least=pooled**2)
    if geometry == "seed_canvas48":
        return crops_layout(7 * side // 4, side, PATCH, kind)
    return (single_layout if geometry == "single_672" else fovea_layout)(cells, PATCH, kind)


def features_for(
    selector: Selector, grid: tuple[int, int] = (2, 2), *, side: int = 9, **options: Any
) -> VisionFeatures:
    """Features on the geometry of a selector; `grid` counts for LaViDa's own geometry alone."""
    if selector.geometry == "lavida_tiles":
        return make_features(grid, side=side, **options)
    return make_features(layout=geometry_layout(selector.geometry, side), side=side, **options)


def picture_box(layout: TokenLayout, size: tuple[int, int], *, padded: bool) -> tuple[float, float, float, float]:
    """Where a picture of (width, height) lies on the canvas after letterboxing, in fractions of the canvas.

    It fills a single view, unless that is `padded`.
    """
    if (layout.canvas == (0, 0) and not padded) or layout.geometry == "single_672":
        return 0.0, 0.0, 1.0, 1.0
    (h, w), (width, height) = layout.canvas_px, size
    if layout.geometry == "fovea":  # a window on the middle two thirds of the letterboxed picture
        long = max(size)
        x, y = 1.5 * width / long, 1.5 * height / long
        return 0.5 - x / 2, 0.5 - y / 2, 0.5 + x / 2, 0.5 + y / 2
    if w / width < h / height:
        new_w, new_h = w, min(ceil(height * (w / width)), h)
    else:
        new_w, new_h = min(ceil(width * (h / height)), w), h
    x, y = (w - new_w) // 2, (h - new_h) // 2
    return x / w, y / h, (x + new_w) / w, (y + new_h) / h


def make_features(
    grid: tuple[int, int] = (2, 2),
    *,
    side: int = 9,
    sizes: Sequence[tuple[int, int]] = ((640, 480), (480, 640)),
    width: int = 16,
    seed: int = 0,
    layout: TokenLayout | None = None,
    tokens: Tensor | None = None,
    relevance: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **pooling: Any,
) -> VisionFeatures:
    """Features of one picture per size; smooth tokens with some noise, so that neighbours resemble each other."""
    layout = layout if layout is not None else layout_of(grid, side, **pooling)
    generator = torch.Generator().manual_seed(seed)
    batch, n = len(sizes), layout.n_tokens
    if tokens is None:
        wave = torch.randn(batch, 2, width, generator=generator)
        smooth = torch.sin(6 * layout.centre_N2 @ wave)
        tokens = smooth + 0.5 * torch.randn(batch, n, width, generator=generator)
    if relevance is None:
        relevance = torch.randn(batch, n, generator=generator)
    tokens = tokens.to(dtype)
    is_single = layout.canvas == (0, 0)
    boxes = torch.tensor([picture_box(layout, size, padded=grid == PADDED) for size in sizes])
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    valid = ((layout.centre_N2 >= low) & (layout.centre_N2 < high)).all(-1)
    valid |= (layout.role_N == Role.GLOBAL) & ((not is_single) | (grid != PADDED))
    away = torch.maximum(low - layout.centre_N2, layout.centre_N2 - high).clamp_min(0).norm(dim=-1)
    valid |= ~valid.any(-1, keepdim=True) & (away <= away.amin(-1, keepdim=True) + 1e-6)
    own = layout.geometry == "lavida_tiles"
    base = tiles_layout(2, 2, side=side, patch_px=PATCH, view_px=side * PATCH + 6, pooling=Pooling(side=ceil(side / 2)))
    base_B = pooled_count_B(layout if own else base, torch.tensor(sizes))
    return VisionFeatures(
        tokens_BND=tokens,
        layout=layout,
        valid_BN=valid,
        picture_B4=boxes,
        size_B2=torch.tensor(sizes),
        ids=tuple(f"picture-{i}" for i in range(batch)),
        n_valid=tuple(valid.sum(-1).tolist()),
        relevance_BN=relevance,
        counts=picture_counts(layout, valid, base_B.tolist()),
        base_count_B=None if own else base_B,
        taps=recorded(tokens),
        boxes=tuple(((0.1 * i, 0.3, 0.1 * i + 0.3, 0.4), (0.7, 0.71, 0.701, 0.711))[: 1 + i % 2] for i in range(batch)),
    )


def recorded(tokens: Tensor) -> dict[str, Tensor]:
    """What a tower could have recorded of these tokens: every tap that a selector asks for, in the tower's dtypes."""
    x, width = tokens.float(), tokens.shape[-1]
    generator = torch.Generator().manual_seed(11)
    normed = F.layer_norm(x, (width,)).to(tokens.dtype)
    taps = {"encoder": tokens, "input@-1": tokens + 0.5, "post_norm@-1": normed}
    taps |= {"input@-2": tokens.flip(-1), "post_norm@-2": normed}
    taps |= {"output@-1": (1.5 * x - 0.5 * x.roll(1, -1)).to(tokens.dtype), "output@-2": tokens - 0.5}
    for layer in ("0.83", "-1", "-2", "0.35"):
        key, query = torch.randn(width, 16, generator=generator), torch.randn(width, generator=generator)
        taps[f"keys@{layer}"] = (x @ key).unflatten(-1, (2, 8)).to(tokens.dtype)
        taps[f"attention@{layer}"] = (F.normalize(x, dim=-1) @ query).sigmoid() / tokens.shape[1]
    pixels = torch.Generator().manual_seed(12)
    taps["pixels"] = torch.rand(*tokens.shape[:2], 3, 4, 4, generator=pixels)
    return taps


def permute_views(features: VisionFeatures, views: Sequence[int]) -> VisionFeatures:
    """The same features with the views in another order and numbered by it."""
    layout, area = features.layout, features.layout.side**2
    moved = torch.cat([torch.arange(area) + area * v for v in views])
    parts = {name: getattr(layout, name)[moved] for name in ("role_N", "cell_N2", "centre_N2", "size_N2")}
    return _moved(features, replace(layout, view_N=torch.arange(len(views)).repeat_interleave(area), **parts), moved)


def mirror(features: VisionFeatures) -> VisionFeatures:
    """The features of the mirrored picture: what stood at the left of the canvas and of the global view is right."""
    layout = features.layout
    width = torch.where(layout.role_N == int(Role.GLOBAL), layout.side, layout.canvas[1])
    key = {(int(r), *cell): i for i, (r, cell) in enumerate(zip(layout.role_N, layout.cell_N2.tolist(), strict=True))}
    moved = [
        key[int(role), row, int(w) - 1 - col]
        for role, (row, col), w in zip(layout.role_N, layout.cell_N2.tolist(), width, strict=True)
    ]
    return _moved(features, layout, torch.tensor(moved))


def _moved(features: VisionFeatures, layout: TokenLayout, index: Tensor) -> VisionFeatures:
    per_token = {f.name: getattr(features, f.name) for f in fields(features) if f.name.split("_")[-1] in ("BN", "BND")}
    return replace(
        features,
        layout=layout,
        taps={name: tap[:, index] for name, tap in features.taps.items()},
        **{name: None if value is None else value[:, index] for name, value in per_token.items()},
    )


def projector(width: int = 16, out: int = 24) -> torch.nn.Sequential:
    """A small projector of LaViDa's kind, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.GELU(), torch.nn.Linear(out, out))


def through(selector: Selector, features: VisionFeatures) -> Selection:
    """What the language model would get: a "post" selector sees projected tokens, a "pre" selector's are projected."""
    project = projector(features.tokens_BND.shape[-1])
    if selector.stage == "post":
        return selector(replace(features, tokens_BND=project(features.tokens_BND)))
    chosen: Selection = selector(features)
    empty = ~chosen.mask_BT | (chosen.source_BT == int(Source.NEWLINE))
    return replace(chosen, tokens_BTD=project(chosen.tokens_BTD).masked_fill(empty[..., None], 0))


def differs(a: Selection, b: Selection) -> bool:
    """Whether the language model reads anything else."""
    if a.mask_BT.shape != b.mask_BT.shape:
        return True
    names = ("tokens_BTD", "index_BT", "source_BT", "mask_BT")
    return any(not torch.equal(getattr(a, name), getattr(b, name)) for name in names)
