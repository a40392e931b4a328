"""Dream's rules: filtered candidates, confidence under the filter, and which slots a step commits.

docs/lavida.md, "Dream's decoding". Unlike LLaDA's, confidence is that of the distribution which candidates are drawn
from: after temperature, top-p and top-k.

Shape letters: B batch, A answer slots, M slots whose logits a step computes, W vocabulary; `...` any shape.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.decode_config import Rule
from lavida_adapter.sampling import Draw, topk_confident

TOP_K = 50
"""The published code never asks for this number: a library default fills it in when none is given."""


def number_of_candidates(rule: Rule) -> int | None:
    """The top-k of a rule; None is every token."""
    return TOP_K if rule.top_k == "model" else rule.top_k


def likely(logits: Tensor, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Probabilities [..., K] of the candidates, and which tokens they are [..., K]; None means all, K = W, in order.

    Top-p keeps a token when those before it sum to at most `top_p`, so the likeliest one always stays.
    """
    if rule.temperature > 0:
        logits = logits / rule.temperature
    top_k = number_of_candidates(rule)
    if top_k is None and rule.top_p is None:
        return logits.softmax(-1), None
    # The k largest first: the sums that top-p compares need no other token, and a sort of the vocabulary is slow.
    whole = top_k is None or top_k >= logits.shape[-1]
    top, ids = logits.sort(dim=-1, descending=True) if whole or top_k is None else logits.topk(top_k, dim=-1)
    if rule.top_p is not None:
        beyond = (top - logits.logsumexp(-1, keepdim=True)).exp().cumsum(-1) > rule.top_p
        top = top.masked_fill(F.pad(beyond[..., :-1], (1, 0), value=False), float("-inf"))
    return top.softmax(-1), ids


def confidence_under(p: Tensor, tokens: Tensor, remasking: str) -> Tensor:
    """Confidence [...] from the candidates' probabilities [..., K] and the place of the chosen one [...]."""
    if remasking == "margin":
        top = F.pad(p, (0, 1)).topk(2, dim=-1).values  # a single candidate is compared with 0
        return top[..., 0] - top[..., 1]
    if remasking == "entropy":
        return (p * torch.log(p + 1e-10)).sum(-1)
    return p.gather(-1, tokens[..., None])[..., 0]


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The places [...] where the cumulative probability passes `u` [...], in [0, 1); none has probability 0."""
    cumulative = p.double().cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    return torch.searchsorted(cumulative, u[..., None].contiguous(), right=True)[..., 0]


def candidates(logits_MW: Tensor, u_M: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """The candidate of each slot [M] and the confidence in it [M]; drawn by `u_M` in [0, 1), or None: the likeliest."""
    p_MK, ids_MK = likely(logits_MW, rule)
    if u_M is None:
        place_M, tokens_M = p_MK.argmax(-1), logits_MW.argmax(-1)
    else:
        place_M = inverse_cdf(p_MK, u_M)
        tokens_M = place_M if ids_MK is None else ids_MK.gather(-1, place_M[:, None])[:, 0]
    return tokens_M, confidence_under(p_MK, place_M, rule.remasking)


def commit_dream(
    logits_BMW: Tensor, open_BM: Tensor, ks: Sequence[int], rule: Rule, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Candidates [B, M], and which are committed [B, M]: in each row `ks` of the open slots, by Dream's rules.

    Everything is float32 from the logits on, and of equal ones the first wins, among tokens and among slots. There is a
    draw for every slot of the answer, so that it does not depend on which slots are computed.
    """
    b, device = len(open_BM), open_BM.device
    u_BM = draw.uniform(b, device) if rule.temperature > 0 else None
    # One answer at a time: in float32 the logits of a batch take gigabytes.
    u_of_rows = [None] * b if u_BM is None else list(u_BM)
    found = [candidates(row_MW.float(), u_M, rule) for row_MW, u_M in zip(logits_BMW, u_of_rows, strict=True)]
    tokens_BM, sure_BM = (torch.stack(parts) for parts in zip(*found, strict=True))
    if rule.threshold is not None:
        best_BM = topk_confident(sure_BM, open_BM, [1] * b)
        return tokens_BM, open_BM & ((sure_BM >= rule.threshold) | best_BM)
    if rule.remasking in ("random", "origin"):
        sure_BM = draw.uniform(b, device)
    elif rule.alg_temp > 0:
        # The k largest after adding Gumbel noise are k draws without replacement from the softmax.
        sure_BM = sure_BM / rule.alg_temp - torch.log(-torch.log(draw.uniform(b, device)))
    return tokens_BM, topk_confident(sure_BM, open_BM, ks)
