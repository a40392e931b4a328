"""What a selector looks up about a layout, computed once (docs/method.md, "Geometries").

A *place* is a token of the global view or a cell of the canvas, in reading order: global view first, then the canvas
row by row. Where views overlap, a place has several candidate tokens; elsewhere the p-th place is the p-th token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shirg.features import Role, TokenLayout


@dataclass(frozen=True, eq=False)
class LayoutTables:
    """N tokens in reading order, M canvas cells, P = n_global + M places, C candidates of a cell, R canvas rows."""

    border_N: Tensor
    """float32: 1 at the border of the token's own view, 0 from half a view inwards."""
    tile_N: Tensor
    """int64: number of the token's view, row by row with a centre crop last; -1 in the global view."""
    in_centre_N: Tensor
    """bool: whether the token's view is the centre crop; no view is one where views do not overlap."""
    by_tile_M: Tensor
    """int64: the canvas tile by tile, as places counted from the start of the canvas; unused where views overlap."""
    from_tile_M: Tensor
    """int64: the inverse of `by_tile_M`."""
    place_N: Tensor
    """int64: the place of each *source* token."""
    candidate_MC: Tensor
    """int64: the source tokens of each canvas cell, the one deepest inside its view first; -1 where there are fewer."""
    centre_P2: Tensor
    """float32: (x, y) of each place as a fraction of its frame."""
    row_end_R: Tensor
    """int64: place in the reading order of tokens of the last token of each canvas row."""
    row_N: Tensor
    """int64: canvas row of each *source* token; -1 in the global view."""


def layout_tables(layout: TokenLayout) -> LayoutTables:
    """The tables of a layout, on its device; built once."""
    if "tables" not in layout.derived:
        layout.derived["layout_tables"] = _build(layout)
    found: LayoutTables = layout.derived["layout_tables"]
    return found


def _build(layout: TokenLayout) -> LayoutTables:
    with torch.inference_mode(False):
        order_N, n, side = layout.order_N, layout.n_global, layout.side
        is_global_N = layout.role_N == int(Role.GLOBAL)
        view_N2 = layout.view_N[:, None].expand(-1, 2)
        origin_V2 = layout.cell_N2.new_zeros(int(layout.view_N.max()) + 1, 2)
        origin_V2 = origin_V2.scatter_reduce(0, view_N2, layout.cell_N2, "amin", include_self=False)
        local_N2 = layout.cell_N2 - origin_V2[layout.view_N]
        inside_N = torch.minimum(local_N2, side - 1 - local_N2).amin(-1)
        reach = max(side // 2, 1)
        border_N = 1 - inside_N.clamp_max(reach) / reach
        number_V, is_centre_V = _number_views(layout, origin_V2)
        tile_N = number_V[layout.view_N].masked_fill(is_global_N, -1)
        # Cells in reading order, and within a cell the token deepest in its view, then the first view.
        flat_N = (layout.cell_N2[:, 0] * layout.canvas[1] + layout.cell_N2[:, 1]).masked_fill(is_global_N, -1)
        place_N = torch.where(is_global_N, layout.rank_N, flat_N + n)
        by_tile_M = torch.argsort(tile_N[order_N][n:], stable=True)
        rows = torch.arange(layout.canvas[0], device=order_N.device)
        row_N = layout.cell_N2[:, 0].masked_fill(is_global_N, -1)
        row_end_R = n - 1 + (row_N[order_N][n:, None] <= rows).sum(0)
        candidate_MC = _candidates(layout, flat_N, border_N, tile_N)
        canvas_M2 = layout.centre_N2[candidate_MC[:, 0].clamp_min(0)]
        return LayoutTables(
            border_N=border_N[order_N],
            tile_N=tile_N[order_N],
            in_centre_N=(is_centre_V[layout.view_N] & ~is_global_N)[order_N],
            by_tile_M=by_tile_M,
            from_tile_M=torch.argsort(by_tile_M),
            place_N=place_N,
            candidate_MC=candidate_MC,
            centre_P2=torch.cat([layout.centre_N2[order_N[:n]], canvas_M2]),
            row_end_R=row_end_R,
            row_N=row_N,
        )


def _number_views(layout: TokenLayout, origin_V2: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each view among the views of the canvas, row by row, and which one is the centre crop."""
    is_global_V = torch.zeros(len(origin_V2), dtype=torch.bool, device=origin_V2.device)
    is_global_V[layout.view_N[layout.role_N == int(Role.GLOBAL)]] = True
    twice_off_V = (2 * origin_V2 + layout.side - torch.tensor(layout.canvas, device=origin_V2.device)).abs().amax(-1)
    is_centre_V = (twice_off_V <= 1) & ~is_global_V & layout.overlaps
    rows, cols = (max(extent, layout.side) for extent in layout.canvas)
    key_V = origin_V2[:, 0] * cols + origin_V2[:, 1] + rows * cols * is_centre_V - 2 * rows * cols * is_global_V
    return torch.argsort(torch.argsort(key_V, stable=True)) - is_global_V.sum(), is_centre_V


def _candidates(layout: TokenLayout, flat_N: Tensor, border_N: Tensor, tile_N: Tensor) -> Tensor:
    cells = layout.canvas[0] * layout.canvas[1]
    order = torch.argsort(tile_N, stable=True)
    order = order[torch.argsort(border_N[order], stable=True)]
    order = order[torch.argsort(flat_N[order], stable=True)][layout.n_global :]
    cell = flat_N[order]
    count_M = torch.bincount(cell, minlength=cells)
    nth = torch.arange(len(cell), device=cell.device) - (count_M.cumsum(0) - count_M)[cell]
    table = cell.new_full((cells, layout.n_views if layout.overlaps else 1), -1)
    table[cell, nth] = order
    return table


def regions(layout: TokenLayout, cells: int, first: int) -> Tensor:
    """int64 [regions, L]: the places, from `first` on, of each block of cells x cells; P where a block has fewer.

    Blocks begin anew in each view, because a region of a view is what a variant promises to cover; where views overlap
    they are blocks of the canvas.
    """
    key = ("regions", cells, first)
    if key not in layout.derived:
        with torch.inference_mode(False):
            layout.derived[key] = _regions(layout, cells, first)
    found: Tensor = layout.derived[key]
    return found


def _regions(layout: TokenLayout, cells: int, first: int) -> Tensor:
    (rows, cols), side, n = layout.canvas, layout.side, layout.n_global
    nowhere, device = n + rows * cols, layout.view_N.device
    grids = [_blocks(1, 1, side, cells, 0, nowhere, device)] if first < n else []
    if layout.overlaps:
        grids.append(_blocks(1, 1, rows, cells, n, nowhere, device))
    elif rows:
        grids.append(_blocks(rows // side, cols // side, side, cells, n, nowhere, device))
    return torch.cat(grids)


def _blocks(down: int, across: int, side: int, cells: int, start: int, nowhere: int, device: torch.device) -> Tensor:
    """The places [blocks, cells * cells] of each block of down x across views of side x side, from `start` on."""
    inside_I = torch.unflatten(torch.arange(-(-side // cells) * cells, device=device), 0, (-1, cells))
    view_row, view_col = torch.arange(down, device=device), torch.arange(across, device=device)
    row = (view_row[:, None, None] * side + inside_I)[:, None, :, None, :, None]
    col = (view_col[:, None, None] * side + inside_I)[None, :, None, :, None, :]
    there = (inside_I < side)[None, None, :, None, :, None] & (inside_I < side)[None, None, None, :, None, :]
    return torch.where(there, start + row * (across * side) + col, nowhere).flatten(0, 3).flatten(1)
