"""From scores to a ranking: representatives of regions, diversity, evidence with an even context, tiers.

docs/method.md, "Coverage", "Diversity", "Evidence and context".

Shape letters: B batch, P grid cells that compete, R regions, L cells of a region, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg.selection import stable_topk


def boost_representatives(scores_BP: Tensor, usable_BP: Tensor, region_RL: Tensor) -> Tensor:
    """Scores in which the best usable cell of each region ranks above all cells that represent no region.

    Equal scores go to the first cell in reading order. `region_RL` holds cells, P where a region has fewer than L.
    """
    b, p = scores_BP.shape
    worth_BP = scores_BP.masked_fill(~usable_BP, float("-inf"))
    low_B1 = scores_BP.masked_fill(~usable_BP, float("inf")).amin(-1, keepdim=True)
    spread_B1 = (worth_BP.amax(-1, keepdim=True) - low_B1).nan_to_num(0.0, 0.0, 0.0)
    worth_BRL = F.pad(worth_BP, (0, 1), value=float("-inf"))[:, region_RL]
    is_best_BRL = (worth_BRL >= worth_BRL.amax(-1, keepdim=True)) & worth_BRL.isfinite()
    first_BR = torch.where(is_best_BRL, region_RL, p).amin(-1)
    chosen_BP = torch.zeros(b, p + 1, dtype=torch.bool, device=scores_BP.device).scatter(1, first_BR, True)[:, :p]
    return scores_BP + chosen_BP * (2 * spread_B1 + 1)


def evidence_first(scores_BP: Tensor, usable_BP: Tensor, n_B: Tensor, mass: float | None, even_P: Tensor) -> Tensor:
    """Scores [B, P] that rank each picture's best n cells first and all others by their place in an even order.

    With `mass` only the fewest of the n that hold this share of the softmax over the usable cells count as best.
    """
    p = scores_BP.shape[1]
    worth_BP = scores_BP.masked_fill(~usable_BP, float("-inf"))
    sorted_BP, best_BP = torch.sort(worth_BP, dim=-1, descending=True, stable=True)
    place_P = torch.arange(p, device=scores_BP.device)
    if mass is not None:
        held_BP = torch.softmax(sorted_BP, dim=-1).cumsum(-1)
        n_B = torch.minimum(n_B, (held_BP < mass).sum(-1) + 1)
    rank_BP = torch.zeros_like(best_BP).scatter(1, best_BP, place_P.expand_as(best_BP))
    return torch.where(rank_BP < n_B[:, None], p - rank_BP, -even_P)


def tiered_topk(groups: Sequence[tuple[Tensor, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The best k tokens [B, k], and how many tokens are usable [B]: one group after the other, each best first.

    A group is (tokens, scores, usable), each [B, n]; equal scores go to the earlier one.
    """
    tokens, usable = [], []
    for token_BX, score_BX, usable_BX in groups:
        best_BX = stable_topk(score_BX.masked_fill(~usable_BX, float("-inf")), token_BX.shape[1])
        tokens.append(token_BX.gather(1, best_BX))
        usable.append(usable_BX.gather(1, best_BX))
    token_BX, usable_BX = torch.cat(tokens, dim=1), torch.cat(usable, dim=1)
    front_BK = stable_topk(usable_BX.float(), k) if len(groups) > 1 else torch.arange(k, device=token_BX.device)
    front_BK = front_BK.expand(len(token_BX), -1)
    return token_BX.gather(1, front_BK), usable_BX.sum(-1)


def marginal_relevance(scores_BP: Tensor, usable_BP: Tensor, states_BPD: Tensor, k: int, weight: float) -> Tensor:
    """Scores [B, P] that rank k cells as picked one by one: by score - `weight` x largest cosine to those picked.

    Carbonell and Goldstein 1998, "The use of MMR". It takes k steps, one for each pick. Cells that are not picked rank
    after those that are.
    """
    unit_BPD = F.normalize(states_BPD.float(), dim=-1)
    left_BP = scores_BP.masked_fill(~usable_BP, float("-inf"))
    nearest_BP = torch.zeros_like(scores_BP)
    rank_BP = torch.full_like(scores_BP, -float(scores_BP.shape[1]))
    for step in range(k):
        pick_B1 = stable_topk(left_BP - weight * nearest_BP, 1)
        rank_BP = rank_BP.scatter(1, pick_B1, -float(step))
        left_BP = left_BP.scatter(1, pick_B1, float("-inf"))
        picked_BD1 = unit_BPD.gather(1, pick_B1[..., None].expand(-1, -1, unit_BPD.shape[-1])).transpose(1, 2)
        cosine_BP = (unit_BPD @ picked_BD1).squeeze(-1)
        nearest_BP = cosine_BP if step == 0 else torch.maximum(nearest_BP, cosine_BP)
    return rank_BP
