"""Where tokens sit: the layout of a tiled canvas and the tables that depend on a layout alone.

Nothing is inferred from a number of tokens: everything follows from the view, role and cell that each token carries
(docs/lavida.md, "Layout").
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shirg.selection import Pooling, Role, TokenLayout


def tiles_layout(
    grid_rows: int, grid_cols: int, side: int, patch_px: int, view_px: int, pooling: Pooling
) -> TokenLayout:
    """One global view and then a grid of tiles, row by row; a grid of 0 x 0 is the global view alone.

    Each view is `view_px` pixels wide and high and has `side` x `side` patches of `patch_px` pixels from its top left
    corner on. What is left over (6 of 384 pixels at side 27 and patch 14) is seen by no token, and so the tokens of
    neighbouring tiles are a little further apart than those inside a tile.
    """
    if min(grid_rows, grid_cols) < 0 or (grid_rows == 0) != (grid_cols == 0):
        raise ValueError(f"a grid of {grid_rows} x {grid_cols} tiles: give two positive numbers, or 0 x 0 for no tiles")
    if side * patch_px > view_px:
        raise ValueError(f"{side} patches of {patch_px} px do not fit into a view of {view_px} px")
    with torch.inference_mode(False):
        row_S, col_S = torch.arange(side * side) // side, torch.arange(side * side) % side
        n_tiles = grid_rows * grid_cols
        view_N = torch.arange(1 + n_tiles).repeat_interleave(side * side)
        is_global = view_N == 0
        tile_row_N = ((view_N - 1) // max(grid_cols, 1)).masked_fill(is_global, 0)
        tile_col_N = ((view_N - 1) % max(grid_cols, 1)).masked_fill(is_global, 0)
        row_N, col_N = row_S.repeat(1 + n_tiles), col_S.repeat(1 + n_tiles)
        canvas_px = (max(grid_rows, 1) * view_px, max(grid_cols, 1) * view_px)
        frame_N2 = torch.where(is_global[:, None], torch.tensor([view_px, view_px]), torch.tensor(canvas_px[::-1]))
        centre_px_N2 = torch.stack(
            [
                tile_col_N * view_px + patch_px * col_N + patch_px / 2,
                tile_row_N * view_px + patch_px * row_N + patch_px / 2,
            ],
            dim=-1,
        )
        return TokenLayout(
            view_N=view_N,
            role_N=torch.where(is_global, int(Role.GLOBAL), int(Role.TILE)),
            cell_N2=torch.stack([tile_row_N * side + row_N, tile_col_N * side + col_N], dim=-1),
            centre_N2=(centre_px_N2.double() / frame_N2).float(),
            size_N2=(patch_px / frame_N2.double()).float(),
            canvas=(grid_rows * side, grid_cols * side),
            side=side,
            pooling=pooling,
            canvas_px=canvas_px,
        )


@dataclass(frozen=True, eq=False)
class Tables:
    """What a selector looks up about a layout, in reading order: global view first, then the canvas row by row."""

    border_N: Tensor
    """float32: 1 at the border of the token's own view, 0 from half a view inwards."""
    tile_N: Tensor
    """int64: place of the token's tile on the canvas, row by row; -1 in the global view."""
    by_tile_M: Tensor
    """int64: the canvas tile by tile, as places counted from the start of the canvas."""
    from_tile_M: Tensor
    """int64: the inverse of `by_tile_M`."""


_TABLES: WeakKeyDictionary[TokenLayout, Tables] = WeakKeyDictionary()
_AREAS: dict[tuple[int, int, torch.device], Tensor] = {}


def tables(layout: TokenLayout) -> Tables:
    """The tables of a layout, on its device; built once."""
    found = _TABLES.get(layout)
    if found is None:
        found = _TABLES[layout] = _build(layout)
    return found


def _build(layout: TokenLayout) -> Tables:
    with torch.inference_mode(False):
        view_N2 = layout.view_N[:, None].expand(-1, 2)
        origin_V2 = layout.cell_N2.new_zeros(int(layout.view_N.max()) + 1, 2)
        origin_V2 = origin_V2.scatter_reduce(0, view_N2, layout.cell_N2, "amin", include_self=False)
        local_N2 = layout.cell_N2 - origin_V2[layout.view_N]
        inside_N = torch.minimum(local_N2, layout.side - 1 - local_N2).amin(-1)
        reach = max(layout.side // 2, 1)
        tile_rc_N2 = layout.cell_N2 // layout.side
        tile_N = tile_rc_N2[:, 0] * (layout.canvas[1] // layout.side) + tile_rc_N2[:, 1]
        tile_N = tile_N.masked_fill(layout.role_N == int(Role.GLOBAL), -1)[layout.order_N]
        by_tile_M = torch.argsort(tile_N[layout.n_global :], stable=True)
        return Tables(
            border_N=(1 - inside_N.clamp_max(reach) / reach)[layout.order_N],
            tile_N=tile_N,
            by_tile_M=by_tile_M,
            from_tile_M=torch.argsort(by_tile_M),
        )


def area_weights(cells: int, windows: int, device: torch.device) -> Tensor:
    """float32 [windows, cells]: share of each of `cells` equal cells in `windows` equal windows over the same length.

    Exact where the one does not divide the other: a cell on a boundary is shared by length. Rows sum to 1 and every
    cell is used up: columns sum to windows / cells.
    """
    key = (cells, windows, device)
    if key not in _AREAS:
        with torch.inference_mode(False):
            # In units of 1 / (cells * windows) all edges are whole numbers.
            cell = torch.arange(cells, device=device) * windows
            window = torch.arange(windows, device=device)[:, None] * cells
            overlap = torch.minimum(cell + windows, window + cells) - torch.maximum(cell, window)
            _AREAS[key] = overlap.clamp_min(0).float() / cells
    return _AREAS[key]


def subdivide(box_B4: Tensor, rows: int, cols: int) -> Tensor:
    """Boxes [..., rows * cols, 4] of equal windows, row by row, that partition the boxes (x0, y0, x1, y1) [..., 4]."""
    index = torch.arange(rows * cols, device=box_B4.device)
    x0, y0, x1, y1 = box_B4[..., None, :].unbind(-1)
    width, height = (x1 - x0) / cols, (y1 - y0) / rows
    left, top = x0 + index % cols * width, y0 + index // cols * height
    return torch.stack([left, top, left + width, top + height], dim=-1)
