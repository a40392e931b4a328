"""Relevance of tokens from plain tensors: cosine to the words of a question, or difference from the other tokens.

docs/method.md, "Relevance". Both sides of a cosine must be in one space, such as projected tokens and word embeddings.

Shape letters: B pictures, N source tokens, Q question tokens, D width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.validation import UserError, one_of

Aggregate = Literal["mean", "max", "pooled"]
"""How the question's tokens count: mean or largest of their cosines, or one cosine to their mean."""


def cosine_relevance(
    tokens_BND: Tensor,
    text: Tensor | Sequence[Tensor],
    *,
    agg: Aggregate = "mean",
    centre: bool = True,
    valid: Tensor | None = None,
    text_centre: Tensor | None = None,
) -> Tensor:
    """float32 [B, N]: cosine of each token and the question's tokens; without gradient.

    Args:
        tokens_BND: tokens in the space of the text, for example projected into that of the word embeddings.
        text: the question's tokens of each picture, [B, Q, D], or B tensors [Q, D].
        agg: "mean" or "max" over the question's tokens, or "pooled", one cosine to their mean.
        centre: subtracts the mean of a picture's valid tokens from its tokens.
        valid: bool [B, N], False for padding. Default: all.
        text_centre: [D], subtracted from the text, such as the mean of all word embeddings. Default: nothing is.

    Raises:
        UserError: shapes that do not fit each other, a question without tokens.
    """
    one_of("agg", agg, Aggregate)
    if tokens_BND.ndim != 3 or len(text) != len(tokens_BND):
        raise UserError(
            f"tokens of shape {tuple(tokens_BND.shape)} and {len(text)} texts: give tokens [B, N, D] and a text for "
            "each of the B pictures"
        )
    width = tokens_BND.shape[-1]
    for i, text_QD in enumerate(text):
        if text_QD.ndim != 2 or not len(text_QD) or text_QD.shape[1] != width:
            raise UserError(
                f"text {i} has the shape {tuple(text_QD.shape)}: give [Q, {width}], at least one token as wide as the "
                "picture's tokens"
            )
    with torch.no_grad():
        valid_BN = torch.ones_like(tokens_BND[..., 0], dtype=torch.bool) if valid is None else valid
        unit_BND = centred_unit(tokens_BND, valid_BN) if centre else F.normalize(tokens_BND.float(), dim=-1)
        rows = zip(unit_BND, text, strict=True)
        return torch.stack([aggregate_cosines(unit_ND, text_QD, agg, text_centre) for unit_ND, text_QD in rows])


def centred_unit(tokens_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """float32: tokens less the mean of their picture's valid tokens, scaled to length 1."""
    x_BND = tokens_BND.float()
    return F.normalize(x_BND - masked_mean(x_BND, valid_BN), dim=-1)


def aggregate_cosines(unit_ND: Tensor, text_QD: Tensor, agg: Aggregate, text_centre: Tensor | None = None) -> Tensor:
    """float32 [N]: cosines of one picture's unit tokens with the question's tokens, aggregated over those."""
    q_QD = text_QD.float() if text_centre is None else text_QD.float() - text_centre
    q_QD = F.normalize(q_QD.mean(0, keepdim=True) if agg == "pooled" else q_QD, dim=-1)
    r_NQ = unit_ND @ q_QD.T
    return r_NQ.amax(-1) if agg == "max" else r_NQ.mean(-1)


def saliency(tokens_BND: Tensor, valid: Tensor | None = None) -> Tensor:
    """float32 [B, N]: 1 - cos(x_i, mean x) over a picture's valid tokens, which reads no question; without gradient."""
    x_BND = tokens_BND.detach().float()
    valid_BN = torch.ones_like(x_BND[..., 0], dtype=torch.bool) if valid is None else valid
    return 1 - F.cosine_similarity(x_BND, masked_mean(x_BND, valid_BN), dim=-1)


def masked_mean(x_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """Mean over valid tokens [B, 1, D]."""
    weight_BN1 = valid_BN[..., None].to(x_BND.dtype)
    return (x_BND * weight_BN1).sum(1, keepdim=True) / weight_BN1.sum(1, keepdim=True).clamp_min(1)
