"""The relevance and neighbour terms of all grid cells in one kernel (docs/method.md, "Terms").

The same in torch is `ScoreTerms.relevance_and_neighbours` in shirg/scoring.py. On a GPU that one moves every token
through memory a dozen times, in as many launches; here a program holds the token of one cell and reads each neighbour
once.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("shirg::relevance_and_neighbours", mutates_args=())
def relevance_and_neighbours(
    states_BND: Tensor,
    token_BP: Tensor,
    usable_BP: Tensor,
    relevance_BP: Tensor,
    n_global: int,
    global_cols: int,
    canvas_cols: int,
    similarity: float,
    neighbour: float,
    squared: bool,
    zscore: bool,
    eps: float,
    clamp: float,
) -> Tensor:
    """float32 [B, P]: similarity x relevance + neighbour x mean distance of unit tokens to their usable 8-neighbours.

    Args:
        token_BP: int64, the token of each cell: `n_global` cells of a grid `global_cols` wide, then a canvas, by rows.
        usable_BP: bool, which cells count.
        relevance_BP: float32.
        canvas_cols: width of the canvas.
        similarity: weight of the relevance.
        neighbour: weight of the distance, with its sign.
        squared: half the square of each distance, which is 1 - cosine, instead of the distance.
        zscore: both terms as z-scores over the usable cells of their grid, clamped to +-`clamp`.
        eps: added to a spread before it divides.
    """
    (batch, n, width), cells = states_BND.shape, token_BP.shape[1]
    score_BP = torch.empty(batch, cells, dtype=torch.float32, device=states_BND.device)
    distance_BP = torch.empty_like(score_BP)
    done_B = torch.zeros(batch, dtype=torch.int32, device=states_BND.device)
    # Triton launches on the current device, not on that of the tensors.
    with torch.cuda.device(states_BND.device if states_BND.is_cuda else -1):
        _kernel()[(cells, batch)](
            states_BND.contiguous(),
            token_BP.contiguous(),
            usable_BP.contiguous(),
            relevance_BP.contiguous(),
            distance_BP,
            done_B,
            score_BP,
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
            SQUARED=squared,
            ZSCORE=zscore,
            WIDTH=_power_of_two(width),
            CELLS=_power_of_two(max(n_global, cells - n_global)),
        )
    return score_BP


@relevance_and_neighbours.register_fake
def _(states_BND: Tensor, token_BP: Tensor, *_: Any) -> Tensor:
    return states_BND.new_empty(token_BP.shape, dtype=torch.float32)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _kernel() -> Any:
    from shirg.kernels.score_triton import score_kernel

    return score_kernel
