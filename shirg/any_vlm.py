"""Features from plain tensors, so that every selector works on the tokens of any vision-language model.

docs/any_vlm.md shows how. Everything is checked here, on the host, before a selector sees it.

Shape letters: B pictures, V views, n tokens of a view, N = V n source tokens, H heads, D width.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from shirg.budget import picture_counts, pooled_count_B
from shirg.features import Pooling, TokenLayout, VisionFeatures
from shirg.layouts import views_layout
from shirg.taps import ANY_LAYER
from shirg.validation import UserError, one_of

GlobalView = Literal["first", "last", "none"]
"""Where the view of the whole picture is among the views: before the tiles, behind them, or absent."""
Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) as fractions."""
Entries = TypeVar("Entries", bound=Sequence[Any])
SHAPES = {None: "[B, N, ...]", 0: "[B, N]", 1: "[B, N, D]", 2: "[B, N, heads, width]"}
"""The shapes of tensors of tokens, by the number of dimensions behind the tokens."""


def features_from(
    tokens: Tensor,
    *,
    grid: tuple[int, int],
    views: tuple[int, int] | None = None,
    global_view: GlobalView = "first",
    valid: Tensor | None = None,
    attention: Tensor | None = None,
    keys: Tensor | None = None,
    relevance: Tensor | None = None,
    taps: Mapping[str, Tensor] | None = None,
    ids: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    picture: Sequence[Box] | None = None,
    boxes: Sequence[Sequence[Box]] | None = None,
    base: int | None = None,
    pooling: Pooling | None = None,
) -> VisionFeatures:
    """What a selector sees, from plain tensors of B pictures that are cut in the same way.

    Tensors of tokens are [B, N, ...] or [B, V, n, ...]; a view is in raster order, without class tokens.

    Args:
        tokens: [B, N, D] or [B, V, n, D]: encoder states, or projected states for a selector of stage "post".
        grid: (rows, columns) of tokens of one view.
        views: (rows, columns) of the tiles, which come row by row; None where the one view is the whole picture.
        global_view: where the view of the whole picture is beside the tiles.
        valid: bool, False for padding. Default: no token is padding.
        attention: what each token receives in its view, averaged over heads and queries [B, N]; or the maps
            [B, H, N, N] or [B, V, H, n, n], rows are queries. It serves a selector whatever layer that asks for.
        keys: attention keys [B, N, H, width], likewise for any layer.
        relevance: one number per token, larger is more relevant (`cosine_relevance`, `saliency`).
        taps: other recordings by name, [B, N, ...] each; "keys@0.83" serves that layer alone and goes before `keys`.
        ids: one text per picture, the seed of random controls. Default: numbered.
        sizes: (width, height) of each picture in pixels, for budget "matched". Default: that of the canvas in tokens.
        picture: where each picture lies on the canvas, in fractions. Default: it fills the canvas.
        boxes: where the evidence of each picture is, in fractions of the picture; only an oracle reads it.
        base: how many tokens the base model uses; then budgets can be "base" or "3/4 base".
        pooling: how the base model pools its (square) views; then budgets can be "matched".

    Raises:
        UserError: shapes that do not fit the grid, values that are not finite, a picture without valid tokens.
    """
    one_of("global_view", global_view, GlobalView)
    layout = _layout(_pair("grid", grid), views and _pair("views", views), global_view, pooling, base)
    b = _check_tokens(tokens, layout)
    layout = _on_device(layout, tokens.device)
    given_sizes = sizes or [layout.canvas_px[::-1]] * b
    names = tuple(f"picture-{i}" for i in range(b)) if ids is None else tuple(map(str, ids))
    _check_length("ids", names, b)
    valid_BN = _valid(valid, tokens, layout, names)
    extra = {name: _of_tokens(f"taps['{name}']", tap, b, layout) for name, tap in (taps or {}).items()}
    if attention is not None:
        extra[f"attention@{ANY_LAYER}"] = _received(attention, b, layout)
    if keys is not None:
        extra[f"keys@{ANY_LAYER}"] = _of_tokens("keys", keys, b, layout, more=2)
    return VisionFeatures(
        tokens_BND=_of_tokens("tokens", tokens, b, layout, more=1),
        layout=layout,
        valid_BN=valid_BN,
        picture_B4=_rows("picture", picture or [(0.0, 0.0, 1.0, 1.0)] * b, b, 4, tokens.device).float(),
        size_B2=_rows("sizes", given_sizes, b, 2, tokens.device).long(),
        ids=names,
        n_valid=tuple(valid_BN.sum(-1).tolist()),
        counts=picture_counts(layout, valid_BN, _base_counts(layout, given_sizes)),
        relevance_BN=None if relevance is None else _of_tokens("relevance", relevance, b, layout, more=0).float(),
        taps=extra,
        boxes=None if boxes is None else tuple(tuple(of_one) for of_one in _check_length("boxes", boxes, b)),
    )


def _layout(
    grid: tuple[int, int],
    views: tuple[int, int] | None,
    global_view: GlobalView,
    pooling: Pooling | None,
    base: int | None,
) -> TokenLayout:
    if views is None and global_view != "first":
        raise UserError(f"global_view={global_view!r} has no effect without views=, the (rows, columns) of the tiles")
    if base is not None and base < 1:
        raise UserError(f"base={base}: give the positive number of tokens that the base model uses")
    tiles = views or (0, 0)
    at = {"first": 0, "last": tiles[0] * tiles[1], "none": None}[global_view]
    return _known_layout(grid, tiles, at, pooling, base)


@lru_cache(maxsize=64)
def _known_layout(
    grid: tuple[int, int], tiles: tuple[int, int], global_at: int | None, pooling: Pooling | None, base: int | None
) -> TokenLayout:
    """One layout for all pictures that are cut in one way: selectors keep tables with it."""
    return views_layout(grid, tiles, global_at, 1, grid, pooling, base_budget=base)


@lru_cache(maxsize=64)
def _on_device(layout: TokenLayout, device: torch.device) -> TokenLayout:
    return layout.to(device)


def _base_counts(layout: TokenLayout, sizes: Sequence[tuple[int, int]]) -> list[int] | None:
    """How many tokens the base model would use for each picture; None where that is not defined."""
    rows, cols = layout.view_shape
    if layout.pooling is None or (layout.canvas != (0, 0) and rows != cols):
        return None
    counts: list[int] = pooled_count_B(layout, torch.tensor(sizes, dtype=torch.int64)).tolist()
    return counts


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    try:
        rows, cols = (int(n) for n in value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={value!r}: give two positive numbers, (rows, columns)") from None
    if min(rows, cols) < 1:
        raise UserError(f"{name}={value!r}: give two positive numbers, (rows, columns)")
    return rows, cols


def _check_tokens(tokens: Tensor, layout: TokenLayout) -> int:
    """How many pictures there are; raises UserError unless the tokens fill the layout."""
    if tokens.ndim not in (3, 4) or not tokens.is_floating_point():
        raise UserError(
            f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype}: give floating-point numbers of shape [B, N, D] "
            "or [B, V, n, D]"
        )
    v, n = layout.n_views, layout.view_tokens
    if tuple(tokens.shape[1:-1]) not in ((v * n,), (v, n)):
        rows, cols = layout.view_shape
        raise UserError(
            f"tokens of shape {tuple(tokens.shape)} are not {v} view{'s' * (v > 1)} of {rows} x {cols} tokens, "
            f"{v * n} in all: check grid, views and global_view, and leave out class tokens"
        )
    return tokens.shape[0]


def _of_tokens(
    name: str, values: Tensor, b: int, layout: TokenLayout, *, more: int | None = None, shape: str = ""
) -> Tensor:
    """Values [B, N, ...] of [B, N, ...] or [B, V, n, ...], with `more` dimensions behind the tokens; all finite."""
    v, n = layout.n_views, layout.view_tokens
    by_view = tuple(values.shape[:3]) == (b, v, n) and (more is None or values.ndim == 3 + more)
    if not by_view and not (tuple(values.shape[:2]) == (b, v * n) and (more is None or values.ndim == 2 + more)):
        raise UserError(
            f"{name} of shape {tuple(values.shape)} does not fit {b} picture{'s' * (b > 1)} of {v * n} tokens; give "
            f"{shape or SHAPES[more]}, or the same by view, [B, V, n, ...]"
        )
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise UserError(f"{name} has values that are NaN or infinite; compute it in float32, and check its input")
    return values.flatten(1, 2) if by_view else values


def _received(attention: Tensor, b: int, layout: TokenLayout) -> Tensor:
    """float32 [B, N]: the attention that each token receives, from itself or from maps."""
    v, n = layout.n_views, layout.view_tokens
    if attention.ndim == 5 and attention.shape[:2] == (b, v) and attention.shape[-2:] == (n, n):
        attention = attention.float().mean((2, 3))
    elif attention.ndim == 4 and attention.shape[0] == b and attention.shape[-2:] == (v * n, v * n):
        attention = attention.float().mean((1, 2))
    shape = "[B, N], or maps [B, heads, N, N] or [B, V, heads, n, n] without class tokens"
    return _of_tokens("attention", attention, b, layout, more=0, shape=shape).float()


def _valid(valid: Tensor | None, tokens: Tensor, layout: TokenLayout, names: tuple[str, ...]) -> Tensor:
    b = len(names)
    if valid is None:
        return torch.ones(b, layout.n_tokens, dtype=torch.bool, device=tokens.device)
    if valid.dtype != torch.bool:
        raise UserError(f"valid is of {valid.dtype}: give a bool tensor, False for padding")
    valid_BN = _of_tokens("valid", valid, b, layout, more=0).to(tokens.device)
    for name, any_valid in zip(names, valid_BN.any(-1).tolist(), strict=True):
        if not any_valid:
            raise UserError(f"valid: picture {name!r} has no token that is not padding")
    return valid_BN


def _check_length(name: str, values: Entries, b: int) -> Entries:
    if len(values) != b:
        raise UserError(f"{name} has {len(values)} entries for {b} pictures; give one for each picture")
    return values


def _rows(name: str, values: Sequence[Sequence[float]], b: int, width: int, device: torch.device) -> Tensor:
    """[B, width] of one short sequence of numbers for each picture."""
    _check_length(name, values, b)
    if any(len(row) != width for row in values):
        raise UserError(f"{name}: give {width} numbers for each picture")
    return torch.tensor([list(map(float, row)) for row in values], device=device)
