"""How busy a token is: variance and edges (docs/method.md, "Variance and edges")."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.scoring import neighbour_term, unit_on_grid

VarianceOf = Literal["channels", "neighbourhood"]
EdgeSpace = Literal["features", "pixels"]


def channel_variance(states_XD: Tensor) -> Tensor:
    """Variance over the channels of each token, its squared length in all but name."""
    return states_XD.float().var(-1, unbiased=False)


def neighbourhood_variance(states_ND: Tensor, token_RC: Tensor, valid_RC: Tensor) -> Tensor:
    """Mean squared deviation [R, C] of unit tokens from the mean of their 3 x 3 window."""
    return neighbour_term(states_ND, token_RC, valid_RC, "local_var")


def edge_term(states_ND: Tensor, token_RC: Tensor, valid_RC: Tensor) -> Tensor:
    """Mean over channels of |sum over the 4 neighbours of (x - neighbour)| [R, C], of unit tokens.

    A neighbour that is missing or not valid counts as equal, so that neither a border nor padding is an edge.
    """
    x_RCD, weight_RC1 = unit_on_grid(states_ND, token_RC), valid_RC[..., None].float()
    total = torch.zeros_like(x_RCD)
    down = (x_RCD[:-1] - x_RCD[1:]) * weight_RC1[:-1] * weight_RC1[1:]
    right = (x_RCD[:, :-1] - x_RCD[:, 1:]) * weight_RC1[:, :-1] * weight_RC1[:, 1:]
    total = total + F.pad(down, (0, 0, 0, 0, 0, 1)) - F.pad(down, (0, 0, 0, 0, 1, 0))
    total = total + F.pad(right, (0, 0, 0, 1)) - F.pad(right, (0, 0, 1, 0))
    return total.abs().mean(-1)


def pixel_edges(patches_X3PP: Tensor) -> Tensor:
    """Mean absolute Laplacian [X] of the grey values inside each patch; patches need at least 3 pixels a side."""
    if patches_X3PP.shape[-1] < 3:
        raise ValueError(f"edge_space=pixels: patches of {patches_X3PP.shape[-1]} px have no inside; choose features")
    grey = patches_X3PP.float().mean(-3)
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return (4 * inner - around).abs().mean((-2, -1))
