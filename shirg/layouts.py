"""Token layouts of each geometry, and the index tables that selectors read (docs/method.md, "Geometries")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shirg.features import Geometry, Pooling, Role, TokenLayout
from shirg.validation import UserError

_AREAS: dict[tuple[int, int, torch.device], Tensor] = {}
"""Results of `area_weights`, by cells, windows and device."""


def tiles_layout(
    grid_rows: int, grid_cols: int, side: int, patch_px: int, view_px: int, pooling: Pooling | None
) -> TokenLayout:
    """One global view and then a grid of tiles, row by row; a grid of 0 x 0 is the global view alone.

    Each view is `view_px` pixels wide and high and has `side` x `side` patches of `patch_px` pixels from its top left
    corner on. The rest (6 of 384 pixels at side 27 and patch 14) belongs to no token, and so the tokens of
    neighbouring tiles are a little further apart than those inside a tile.
    """
    if min(grid_rows, grid_cols) < 0 or (grid_rows == 0) != (grid_cols == 0):
        raise UserError(f"a grid of {grid_rows} x {grid_cols} tiles: give two positive numbers, or 0 x 0 for no tiles")
    if side * patch_px > view_px:
        raise UserError(f"{side} patches of {patch_px} px do not fit into a view of {view_px} px")
    return views_layout((side, side), (grid_rows, grid_cols), 0, patch_px, (view_px, view_px), pooling)


def views_layout(
    view: tuple[int, int],
    tiles: tuple[int, int],
    global_at: int | None,
    patch_px: int,
    view_px: tuple[int, int],
    pooling: Pooling | None,
    base_budget: int | None = None,
) -> TokenLayout:
    """A grid of tiles, row by row, and the global view as view number `global_at` among them (None: there is none).

    `view` and `view_px` are (rows, columns) of one view in tokens and in pixels, `tiles` those of the grid; 0 x 0 is
    the global view alone.
    """
    with torch.inference_mode(False):
        (rows, cols), (grid_rows, grid_cols), (high, wide) = view, tiles, view_px
        area, n_views = rows * cols, grid_rows * grid_cols + (global_at is not None)
        view_N = torch.arange(n_views).repeat_interleave(area)
        is_global = torch.zeros_like(view_N) > 0 if global_at is None else view_N == global_at
        tile_N = view_N if global_at is None else view_N - (view_N > global_at).long()
        tile_row_N = (tile_N // max(grid_cols, 1)).masked_fill(is_global, 0)
        tile_col_N = (tile_N % max(grid_cols, 1)).masked_fill(is_global, 0)
        row_N, col_N = (torch.arange(area) // cols).repeat(n_views), (torch.arange(area) % cols).repeat(n_views)
        canvas_px = (max(grid_rows, 1) * high, max(grid_cols, 1) * wide)
        frame_N2 = torch.where(is_global[:, None], torch.tensor([wide, high]), torch.tensor(canvas_px[::-1]))
        x_px_N = tile_col_N * wide + patch_px * col_N + patch_px / 2
        y_px_N = tile_row_N * high + patch_px * row_N + patch_px / 2
        return TokenLayout(
            view_N=view_N,
            role_N=torch.where(is_global, int(Role.GLOBAL), int(Role.TILE)),
            cell_N2=torch.stack([tile_row_N * rows + row_N, tile_col_N * cols + col_N], dim=-1),
            centre_N2=(torch.stack([x_px_N, y_px_N], dim=-1).double() / frame_N2).float(),
            size_N2=(patch_px / frame_N2.double()).float(),
            canvas=(grid_rows * rows, grid_cols * cols),
            view_shape=view,
            pooling=pooling,
            canvas_px=canvas_px,
            base_budget=base_budget,
        )


def crops_layout(cells: int, side: int, patch_px: int, pooling: Pooling) -> TokenLayout:
    """Five overlapping crops of a square canvas of cells x cells patches: four corners and the centre, no global view.

    All crops start on a cell, so that tokens of different crops cover exactly the same patches. The centre crop is up
    to half a cell off the centre.
    """
    if not side < cells <= 2 * side:
        raise UserError(
            f"geometry=seed_canvas48: crops of {side} x {side} tokens cannot overlap and cover a canvas of "
            f"{cells} x {cells}; use a model with larger views"
        )
    far, middle = cells - side, (cells - side) // 2
    origins = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    return _square(origins, [Role.CROP] * 5, cells, side, patch_px, pooling, "seed_canvas48")


def single_layout(cells: int, patch_px: int, pooling: Pooling, geometry: Geometry = "single_672") -> TokenLayout:
    """One view of cells x cells patches that shows the whole picture at a finer scale; it is its own canvas."""
    return _square([(0, 0)], [Role.TILE], cells, cells, patch_px, pooling, geometry)


def fovea_layout(cells: int, patch_px: int, pooling: Pooling) -> TokenLayout:
    """The whole picture, squashed, and a window on its centre, both of cells x cells patches; the window is the canvas.

    The picture reaches beyond this canvas: `VisionFeatures.picture_B4` is then outside [0, 1].
    """
    return _square([(0, 0), (0, 0)], [Role.GLOBAL, Role.TILE], cells, cells, patch_px, pooling, "fovea")


def _square(
    origins: list[tuple[int, int]],
    roles: list[Role],
    cells: int,
    side: int,
    patch_px: int,
    pooling: Pooling,
    geometry: Geometry,
) -> TokenLayout:
    """Views of side x side patches that start at the given cells of a square canvas without margins."""
    with torch.inference_mode(False):
        area = side * side
        within_A2 = torch.stack([torch.arange(area) // side, torch.arange(area) % side], dim=-1)
        cell_N2 = (torch.tensor(origins)[:, None] + within_A2).flatten(0, 1)
        return TokenLayout(
            view_N=torch.arange(len(origins)).repeat_interleave(area),
            role_N=torch.tensor([int(role) for role in roles]).repeat_interleave(area),
            cell_N2=cell_N2,
            centre_N2=((cell_N2.flip(-1).double() + 0.5) / cells).float(),
            size_N2=torch.full((len(cell_N2), 2), 1 / cells),
            canvas=(cells, cells),
            view_shape=(side, side),
            pooling=pooling,
            canvas_px=(cells * patch_px, cells * patch_px),
            geometry=geometry,
        )


def area_weights(cells: int, windows: int, device: torch.device) -> Tensor:
    """float32 [windows, cells]: share of each of `cells` equal cells in `windows` equal windows over the same length.

    Exact where the one does not divide the other: a cell on a boundary is shared by length. Rows sum to 1, columns to
    windows / cells.
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


@dataclass(frozen=True, eq=False)
class LayoutTables:
    """Index tables of a layout.

    Shape letters: N tokens in reading order, M canvas cells, P = n_global + M grid cells (those of the global view,
    then those of the canvas), C tokens that share a cell, R canvas rows.
    """

    border_N: Tensor
    """float32: 1 at the border of the token's own view, 0 from half a view inwards."""
    tile_N: Tensor
    """int64: number of the token's view, row by row with a centre crop last; -1 in the global view."""
    in_centre_N: Tensor
    """bool: whether the token's view is the centre crop; all False where views do not overlap."""
    by_tile_M: Tensor
    """int64: the canvas cells tile by tile, counted from the start of the canvas; unused where views overlap."""
    from_tile_M: Tensor
    """int64: the inverse of `by_tile_M`."""
    grid_cell_N: Tensor
    """int64: the grid cell, 0 to P - 1, of each *source* token."""
    candidate_MC: Tensor
    """int64: the source tokens of each canvas cell, the one deepest inside its view first; -1 where there are fewer."""
    centre_P2: Tensor
    """float32: (x, y) of each grid cell as a fraction of its frame."""
    row_end_R: Tensor
    """int64: rank in reading order of the last token of each canvas row."""
    row_N: Tensor
    """int64: canvas row of each *source* token; -1 in the global view."""
    even_P: Tensor
    """float32: each grid cell's place in an even order, 0 first: the finest grid dithered, then the other cells."""


def layout_tables(layout: TokenLayout) -> LayoutTables:
    """The tables of a layout, on its device; built once."""
    if "tables" not in layout.derived:
        layout.derived["tables"] = _build(layout)
    found: LayoutTables = layout.derived["tables"]
    return found


def _build(layout: TokenLayout) -> LayoutTables:
    with torch.inference_mode(False):
        order_N, n = layout.order_N, layout.n_global
        is_global_N = layout.role_N == int(Role.GLOBAL)
        view_N2 = layout.view_N[:, None].expand(-1, 2)
        origin_V2 = layout.cell_N2.new_zeros(int(layout.view_N.max()) + 1, 2)
        origin_V2 = origin_V2.scatter_reduce(0, view_N2, layout.cell_N2, "amin", include_self=False)
        local_N2 = layout.cell_N2 - origin_V2[layout.view_N]
        last_2 = torch.tensor(layout.view_shape, device=order_N.device) - 1
        inside_N = torch.minimum(local_N2, last_2 - local_N2).amin(-1)
        reach = max(min(layout.view_shape) // 2, 1)
        border_N = 1 - inside_N.clamp_max(reach) / reach
        number_V, is_centre_V = _number_views(layout, origin_V2)
        tile_N = number_V[layout.view_N].masked_fill(is_global_N, -1)
        # Cells in reading order, and within a cell the token deepest in its view, then the first view.
        flat_N = (layout.cell_N2[:, 0] * layout.canvas[1] + layout.cell_N2[:, 1]).masked_fill(is_global_N, -1)
        grid_cell_N = torch.where(is_global_N, layout.rank_N, flat_N + n)
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
            grid_cell_N=grid_cell_N,
            candidate_MC=candidate_MC,
            centre_P2=torch.cat([layout.centre_N2[order_N[:n]], canvas_M2]),
            row_end_R=row_end_R,
            row_N=row_N,
            even_P=_even_order(layout),
        )


def _even_order(layout: TokenLayout) -> Tensor:
    """float32 [P]: the place of each grid cell in the order of `dither` over the finest grid; other cells come last."""
    part, (rows, cols) = layout.finest
    device = layout.view_N.device
    lit_M = dither(torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(cols, device=device)))
    place_M = torch.argsort(torch.argsort(lit_M, stable=True))
    before_P = torch.arange(part.start, device=device) + rows * cols
    return torch.cat([before_P, place_M]).float()


def _number_views(layout: TokenLayout, origin_V2: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each view among the views of the canvas, row by row, and which one is the centre crop."""
    is_global_V = torch.zeros(len(origin_V2), dtype=torch.bool, device=origin_V2.device)
    is_global_V[layout.view_N[layout.role_N == int(Role.GLOBAL)]] = True
    view_2, canvas_2 = (torch.tensor(shape, device=origin_V2.device) for shape in (layout.view_shape, layout.canvas))
    twice_off_V = (2 * origin_V2 + view_2 - canvas_2).abs().amax(-1)
    is_centre_V = (twice_off_V <= 1) & ~is_global_V & layout.overlaps
    rows, cols = (max(extent, view) for extent, view in zip(layout.canvas, layout.view_shape, strict=True))
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
    """int64 [regions, L]: the grid cells, from `first` on, of each block of cells x cells; P where a block has fewer.

    Blocks begin anew in each view, because a variant guarantees to cover the regions of a view; where views overlap
    they are blocks of the canvas.
    """
    key = ("regions", cells, first)
    if key not in layout.derived:
        with torch.inference_mode(False):
            layout.derived[key] = _regions(layout, cells, first)
    found: Tensor = layout.derived[key]
    return found


def _regions(layout: TokenLayout, cells: int, first: int) -> Tensor:
    (rows, cols), view, n = layout.canvas, layout.view_shape, layout.n_global
    outside, device = n + rows * cols, layout.view_N.device
    grids = [_blocks((1, 1), view, cells, 0, outside, device)] if first < n else []
    if layout.overlaps:
        grids.append(_blocks((1, 1), layout.canvas, cells, n, outside, device))
    elif rows:
        grids.append(_blocks((rows // view[0], cols // view[1]), view, cells, n, outside, device))
    return torch.cat(grids)


def _blocks(
    views: tuple[int, int], view: tuple[int, int], cells: int, start: int, outside: int, device: torch.device
) -> Tensor:
    """The cells [blocks, cells * cells] of each block of a grid of views, both (rows, columns), from `start` on."""
    (down, across), (rows, cols) = views, view
    row_I, col_I = (torch.unflatten(torch.arange(-(-n // cells) * cells, device=device), 0, (-1, cells)) for n in view)
    view_row, view_col = torch.arange(down, device=device), torch.arange(across, device=device)
    row = (view_row[:, None, None] * rows + row_I)[:, None, :, None, :, None]
    col = (view_col[:, None, None] * cols + col_I)[None, :, None, :, None, :]
    exists = (row_I < rows)[None, None, :, None, :, None] & (col_I < cols)[None, None, None, :, None, :]
    return torch.where(exists, start + row * (across * cols) + col, outside).flatten(0, 3).flatten(1)


def black_fields(rows: int, cols: int, device: torch.device) -> Tensor:
    """bool [rows, cols]: the black fields of a chessboard, into whose cells those of white fields can be merged."""
    row, col = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)
    return (row + col) % 2 == 1


def dither(cell_N2: Tensor, bits: int = 7) -> Tensor:
    """float32 [N]: when each cell is lit as a picture brightens, in the recursive matrix of side 2 ** bits.

    The bits of (row xor column, row), low ones first, interleaved: neighbours are as far apart in the order as can be.
    """
    row_N, col_N = cell_N2.unbind(-1)
    order_N = torch.zeros_like(row_N)
    for bit in range(bits):
        mixed_N, low_N = ((row_N ^ col_N) >> bit) & 1, (row_N >> bit) & 1
        order_N = order_N | (mixed_N << (2 * (bits - bit) - 1)) | (low_N << (2 * (bits - bit) - 2))
    return order_N.float()
