"""Where tokens sit: the layouts of LaViDa's tiles and of the other geometries.

Nothing is inferred from a number of tokens: everything follows from the view, role and cell that each token carries
(docs/lavida.md, "Layout"; docs/method.md, "Geometries").
"""

import torch
from torch import Tensor

from shirg.features import Geometry, Pooling, Role, TokenLayout

_AREAS: dict[tuple[int, int, torch.device], Tensor] = {}
"""What `area_weights` has computed: constants of a geometry, by cells, windows and device."""


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


def crops_layout(cells: int, side: int, patch_px: int, pooling: Pooling) -> TokenLayout:
    """Five overlapping crops of a square canvas of cells x cells patches: four corners and the centre, no global view.

    All crops start on a cell, so that tokens of different crops sit on exactly the same patches. The centre crop is up
    to half a cell off the centre.
    """
    if not side < cells <= 2 * side:
        raise ValueError(
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
            side=side,
            pooling=pooling,
            canvas_px=(cells * patch_px, cells * patch_px),
            geometry=geometry,
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
