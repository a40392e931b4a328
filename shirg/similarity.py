"""Relevance of tokens from plain tensors: cosine to the words of a question, or difference from the other tokens.

docs/method.md, "Relevance". Both sides of a cosine must be in one space, such as projected tokens and word embeddings.

Shape letters: B pictures, N source tokens, Q question tokens, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.validation import UserError, one_of

Aggregate = Literal["mean", "max", "pooled"]
"""How the question's tokens count: mean or largest of their cosines, or one cosine to their mean."""
ROWS = 128
"""Tokens that are compared at a time on a CPU: in float32 they fit its cache."""
SHORTEST = 1e-12
"""A shorter token counts as one of this length, so that a zero token has the cosine 0."""


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
        pictures = zip(tokens_BND, valid_BN if centre else [None] * len(text), text, strict=True)
        return torch.cat([question_cosines(x, [text_QD], agg, v, text_centre) for x, v, text_QD in pictures])


def question_cosines(
    tokens_ND: Tensor,
    questions: Sequence[Tensor],
    agg: Aggregate,
    valid_N: Tensor | None = None,
    text_centre: Tensor | None = None,
) -> Tensor:
    """float32 [len(questions), N]: cosine of each token of a picture and the words [Q, D] of each question, aggregated.

    `valid_N`: the mean of these tokens is subtracted from all; None: nothing is.
    """
    directions = [_directions(text_QD, agg, text_centre) for text_QD in questions]
    mean_D = None if valid_N is None else _mean_of_valid(tokens_ND, valid_N)
    found_QN = torch.empty(len(questions), len(tokens_ND), device=tokens_ND.device)
    for part, x_RD in _parts(tokens_ND):
        if mean_D is not None:
            x_RD -= mean_D
        length_R = torch.linalg.vector_norm(x_RD, dim=-1).clamp_min(SHORTEST)
        # Question by question: a product with all words at once would round differently beside other questions.
        for found_N, words_WD in zip(found_QN, directions, strict=True):
            r_RW = x_RD @ words_WD.T
            r_R = r_RW.amax(-1) if agg == "max" else r_RW[:, 0]
            torch.div(r_R, length_R, out=found_N[part])
    return found_QN


def _parts(tokens_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """float32 copies [R, D] of the tokens, part by part on a CPU; each lies where the last one was.

    There new memory would cost more time than the arithmetic.
    """
    rows = ROWS if tokens_ND.device.type == "cpu" else len(tokens_ND)
    buffer_RD = torch.empty(rows, tokens_ND.shape[-1], device=tokens_ND.device)
    for start in range(0, len(tokens_ND), rows):
        part = slice(start, start + rows)
        yield part, buffer_RD[: len(tokens_ND[part])].copy_(tokens_ND[part])


def _directions(text_QD: Tensor, agg: Aggregate, text_centre: Tensor | None) -> Tensor:
    """float32 [W, D]: the vectors whose largest product with a unit token is the aggregated cosine."""
    q_QD = text_QD.float() if text_centre is None else text_QD.float() - text_centre
    if agg == "pooled":
        return F.normalize(q_QD.mean(0, keepdim=True), dim=-1)
    q_QD = F.normalize(q_QD, dim=-1)
    # The mean of products is the product with the mean.
    return q_QD if agg == "max" else q_QD.mean(0, keepdim=True)


def _mean_of_valid(tokens_ND: Tensor, valid_N: Tensor) -> Tensor:
    """float32 [D]: the mean of the valid tokens."""
    weight_N = valid_N.float()
    sums = [weight_N[part] @ x_RD for part, x_RD in _parts(tokens_ND)]
    return sum(sums[1:], sums[0]) / weight_N.sum().clamp_min(1)


def saliency(tokens_BND: Tensor, valid: Tensor | None = None) -> Tensor:
    """float32 [B, N]: 1 - cos(x_i, mean x) over a picture's valid tokens, which reads no question; without gradient."""
    x_BND = tokens_BND.detach().float()
    valid_BN = torch.ones_like(x_BND[..., 0], dtype=torch.bool) if valid is None else valid
    return 1 - F.cosine_similarity(x_BND, masked_mean(x_BND, valid_BN), dim=-1)


def masked_mean(x_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """Mean over valid tokens [B, 1, D]."""
    weight_BN1 = valid_BN[..., None].to(x_BND.dtype)
    return (x_BND * weight_BN1).sum(1, keepdim=True) / weight_BN1.sum(1, keepdim=True).clamp_min(1)
