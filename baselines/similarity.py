"""Products of tokens with tokens, at the cost that a CPU has to pay for them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shirg import gather_tokens

BLOCK = 456
"""Rows of a Gram matrix that are computed at a time: large enough for a fast product, an eighth of five views."""
CACHED = 1 << 18
"""Products that are handed out at a time where each is looked at only once: one megabyte, so that a core's cache holds
them and the same memory serves again."""


def gram(x_BGSD: Tensor) -> Tensor:
    """Dot products [B, G, S, S] of all tokens of a group; equal to x @ x^T, which computes every one of them twice.

    What lies above the diagonal is computed block by block, and copied to below it.
    """
    s = x_BGSD.shape[-2]
    if s <= BLOCK or x_BGSD.device.type != "cpu":
        return x_BGSD @ x_BGSD.transpose(-1, -2)
    out_BGSS = x_BGSD.new_empty(*x_BGSD.shape[:-1], s)
    for first in range(0, s, BLOCK):
        end = min(first + BLOCK, s)
        strip = x_BGSD[..., first:end, :] @ x_BGSD[..., first:, :].transpose(-1, -2)
        out_BGSS[..., first:end, first:] = strip
        out_BGSS[..., end:, first:end] = strip[..., end - first :].transpose(-1, -2)
    return out_BGSS


def rows(x_BGSD: Tensor, place_BGM: Tensor) -> Tensor:
    """Rows [B, G, M, D] of each group by their place."""
    picked = gather_tokens(x_BGSD.flatten(0, 1), place_BGM.flatten(0, 1))
    return torch.unflatten(picked, 0, place_BGM.shape[:2])


def products(a_XED: Tensor, b_XOD: Tensor, used_XO: Tensor, otherwise: float) -> Tensor:
    """Dot products [X, E, O]; `otherwise` with every b that is not used."""
    a, b = _with_fill(a_XED, b_XOD, used_XO, otherwise)
    return a @ b.transpose(-1, -2)


def product_strips(a_XED: Tensor, b_XOD: Tensor, used_XO: Tensor, otherwise: float) -> Iterator[Tensor]:
    """The same, some of the E rows at a time; all of them where that costs nothing, which is not on a CPU."""
    a, b = _with_fill(a_XED, b_XOD, used_XO, otherwise)
    row = b[..., 0].numel()
    for strip in a.split(max(1, CACHED // row) if a.device.type == "cpu" else a.shape[-2], dim=-2):
        yield strip @ b.transpose(-1, -2)


def _with_fill(a_XED: Tensor, b_XOD: Tensor, used_XO: Tensor, otherwise: float) -> tuple[Tensor, Tensor]:
    """Both with one more channel, in which each a is 1: filling a matrix by a mask takes longer than computing it."""
    b_XOD = b_XOD * used_XO[..., None]
    fill_XO1 = torch.where(used_XO, 0.0, otherwise)[..., None]
    return torch.cat([a_XED, torch.ones_like(a_XED[..., :1])], dim=-1), torch.cat([b_XOD, fill_XO1], dim=-1)
