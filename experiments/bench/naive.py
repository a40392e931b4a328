"""SHIRG-980 as one writes it first: a dictionary of cells and a loop over them. What the fast code is timed against."""

import math

import torch
from torch import Tensor

from shirg import Role, VisionFeatures

Cell = tuple[int, int]
WEIGHT, SIGN = {"similarity": 0.65, "neighbor": 0.25}, -1


def naive_shirg980(features: VisionFeatures, sample: int, budget: int, scaffold: int = 8) -> tuple[Tensor, list[int]]:
    """The tokens [budget, D] of one picture and the source tokens among them, by the published weights.

    It reads the tiles alone, so it needs a picture whose tiles have enough valid tokens.
    """
    tokens_ND, layout = features.tokens_BND[sample].float(), features.layout
    relevance, valid = features.relevance_BN, features.valid_BN[sample].tolist()
    assert relevance is not None
    roles, cells = layout.role_N.tolist(), [(r, c) for r, c in layout.cell_N2.tolist()]
    tile_at = {cells[i]: i for i in range(layout.n_tokens) if roles[i] == Role.TILE and valid[i]}
    coarse_at = {cells[i]: i for i in range(layout.n_tokens) if roles[i] == Role.GLOBAL}
    unit_ND = torch.nn.functional.normalize(tokens_ND, dim=-1)
    distance = {cell: _distance(unit_ND, tile_at, cell) for cell in tile_at}
    r = _zscore({cell: float(relevance[sample, i]) for cell, i in tile_at.items()})
    d = _zscore(distance)
    score = {cell: WEIGHT["similarity"] * r[cell] + SIGN * WEIGHT["neighbor"] * d[cell] for cell in tile_at}
    best = sorted(tile_at, key=lambda cell: (-score[cell], cell))[: budget - scaffold**2]
    kept = [tile_at[cell] for cell in sorted(best)]
    windows = [
        _naive_window(tokens_ND, coarse_at, layout.side, scaffold, *divmod(w, scaffold)) for w in range(scaffold**2)
    ]
    return torch.cat([torch.stack(windows), tokens_ND[kept]]), kept


def _distance(unit_ND: Tensor, token_at: dict[Cell, int], cell: Cell) -> float:
    around = [
        (cell[0] + down, cell[1] + right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)
    ]
    neighbours = [token_at[place] for place in around if place in token_at]
    if not neighbours:
        return 0.0
    return float((unit_ND[neighbours] - unit_ND[token_at[cell]]).norm(dim=-1).mean())


def _zscore(values: dict[Cell, float]) -> dict[Cell, float]:
    mean = sum(values.values()) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / len(values))
    return {cell: max(-3.0, min(3.0, (value - mean) / (std + 1e-6))) for cell, value in values.items()}


def _naive_window(tokens_ND: Tensor, token_at: dict[Cell, int], side: int, size: int, row: int, col: int) -> Tensor:
    """Mean over a window of the global view; a cell on a boundary counts by the share that lies inside."""
    total, area = torch.zeros(tokens_ND.shape[-1]), 0.0
    for r in range(row * side // size, math.ceil((row + 1) * side / size)):
        for c in range(col * side // size, math.ceil((col + 1) * side / size)):
            high = min(r + 1, (row + 1) * side / size) - max(r, row * side / size)
            wide = min(c + 1, (col + 1) * side / size) - max(c, col * side / size)
            total, area = total + high * wide * tokens_ND[token_at[r, c]], area + high * wide
    return total / area
