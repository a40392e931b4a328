"""The Triton side of `shirg.kernels.score`; the only file that imports Triton."""

import triton
import triton.language as tl


@triton.jit
def _unit(states, token, width, WIDTH: tl.constexpr):
    """One token, scaled to length 1; zero stays zero, an overflow becomes NaN."""
    at = tl.arange(0, WIDTH)
    x = tl.load(states + token * width + at, mask=at < width, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    norm = tl.where(norm == float("inf"), float("nan"), norm)
    return x / tl.where(norm == 0.0, 1.0, norm)


@triton.jit
def _distance(states, token, usable, cell, first, rows, cols, width, SQUARED: tl.constexpr, WIDTH: tl.constexpr):
    """Mean distance of one cell of the grid that begins at cell `first` to its usable 8-neighbours; 0 without any."""
    offset = cell - first
    row, col = offset // cols, offset % cols
    here = _unit(states, tl.load(token + cell), width, WIDTH)
    here_counts = tl.load(usable + cell).to(tl.float32)
    total, count = 0.0, 0.0
    for k in tl.static_range(9):
        if k != 4:
            r, c = row + k // 3 - 1, col + k % 3 - 1
            exists = (r >= 0) & (r < rows) & (c >= 0) & (c < cols)
            there = tl.where(exists, first + r * cols + c, cell)
            counts = tl.where(exists, tl.load(usable + there).to(tl.float32), 0.0) * here_counts
            gap = here - _unit(states, tl.load(token + there), width, WIDTH)
            square = tl.sum(gap * gap, axis=0)
            total += counts * (square / 2 if SQUARED else tl.sqrt(square))
            count += counts
    return total / tl.maximum(count, 1.0)


@triton.jit
def _zscore(values, usable, eps, clamp):
    count = tl.maximum(tl.sum(usable, axis=0), 1.0)
    centred = values - tl.sum(tl.where(usable > 0, values, 0.0), axis=0) / count
    spread = tl.sqrt(tl.sum(tl.where(usable > 0, centred * centred, 0.0), axis=0) / count)
    z = centred / (spread + eps)
    # A comparison, not minimum and maximum, which may drop a NaN.
    return tl.where(z > clamp, clamp, tl.where(z < -clamp, -clamp, z))


@triton.jit
def _score(
    usable,
    relevance,
    distance,
    score,
    first,
    end,
    similarity,
    neighbour,
    eps,
    clamp,
    ZSCORE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Both terms of all cells of one grid of one picture."""
    cell = first + tl.arange(0, CELLS)
    there = cell < end
    counts = tl.load(usable + cell, mask=there, other=0).to(tl.float32)
    r = tl.load(relevance + cell, mask=there, other=0.0)
    # Other programs wrote the distances: past the first cache, which may be older.
    d = tl.load(distance + cell, mask=there, other=0.0, cache_modifier=".cg")
    if ZSCORE:
        r, d = _zscore(r, counts, eps, clamp), _zscore(d, counts, eps, clamp)
    tl.store(score + cell, similarity * r + neighbour * d, mask=there)


@triton.jit
def score_kernel(
    states,
    token,
    usable,
    relevance,
    distance,
    done,
    score,
    n,
    width,
    cells,
    n_global,
    global_cols,
    canvas_cols,
    similarity,
    neighbour,
    eps,
    clamp,
    SQUARED: tl.constexpr,
    ZSCORE: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
):
    """One cell of one picture: program (cell, picture). The last program of a picture adds up its scores."""
    cell, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    states += picture * n * width
    token += picture * cells
    usable += picture * cells
    relevance += picture * cells
    distance += picture * cells
    score += picture * cells
    in_global = cell < n_global
    first = tl.where(in_global, 0, n_global)
    cols = tl.where(in_global, global_cols, canvas_cols)
    rows = tl.where(in_global, n_global, cells - n_global) // cols
    d = _distance(states, token, usable, cell, first, rows, cols, width, SQUARED, WIDTH)
    tl.store(distance + cell, d)
    # All of this program's stores come before its tick, and the last tick comes after all the others.
    tl.debug_barrier()
    if tl.atomic_add(done + picture, 1, sem="acq_rel") == cells - 1:
        if n_global > 0:
            _score(usable, relevance, distance, score, 0, n_global, similarity, neighbour, eps, clamp, ZSCORE, CELLS)
        if cells > n_global:
            _score(
                usable, relevance, distance, score, n_global, cells, similarity, neighbour, eps, clamp, ZSCORE, CELLS
            )
