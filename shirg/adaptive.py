"""How many tokens a picture deserves, from how its scores are spread (docs/method.md, "Budget by content")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shirg.options import Adaptive

TEMPERATURES = (0.25, 0.5, 1.0, 2.0)


def effective_number(scores_BP: Tensor, usable_BP: Tensor, temperature: float) -> Tensor:
    """exp(entropy) [B] of softmax(score / temperature): as many equally relevant tokens would be as uncertain."""
    logit_BP = (scores_BP / temperature).masked_fill(~usable_BP, -1e30)
    log_p_BP = logit_BP.log_softmax(-1)
    entropy_B = -(log_p_BP.exp() * log_p_BP.masked_fill(~usable_BP, 0.0)).sum(-1)
    return entropy_B.exp()


def count_by_entropy(scores_BP: Tensor, usable_BP: Tensor, levels: Sequence[int], temperature: float) -> Tensor:
    """The smallest level [B] that holds the effective number of relevant tokens, else the largest."""
    level_L = torch.tensor(sorted(levels), device=scores_BP.device)
    effective_B1 = effective_number(scores_BP, usable_BP, temperature)[:, None]
    too_small_BL = level_L < effective_B1 * (1 - 1e-5)
    return level_L[too_small_BL.sum(-1).clamp_max(len(levels) - 1)]


class AdaptiveHead(nn.Module):
    """Expects a loss for each level of the budget, and takes the smallest level that is not expected to cost much.

    It sees the share of all tokens that is relevant, exp(entropy) / n, at four temperatures. It starts out by expecting
    more of a larger budget, whatever the picture is, and so keeps everything until it has learned better.
    """

    def __init__(self, knobs: Adaptive) -> None:
        super().__init__()
        self.tolerance = knobs.tolerance
        self.linear = nn.Linear(len(TEMPERATURES), len(knobs.levels))
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(1 - torch.tensor(knobs.levels))

    def forward(self, scores_BP: Tensor, usable_BP: Tensor, level: int | None = None) -> tuple[Tensor, Tensor]:
        """The level of each picture [B], and the loss that is expected at it [B], float32 with a graph.

        `level` fixes it, as in training.
        """
        scores_BP = scores_BP.detach()
        n_B = usable_BP.sum(-1).clamp_min(1)
        shares = [effective_number(scores_BP, usable_BP, t) / n_B for t in TEMPERATURES]
        share_BS = torch.stack(shares, dim=-1).to(self.linear.weight.dtype)
        expected_BL: Tensor = self.linear(share_BS).float()
        if level is None:
            good_BL = expected_BL <= expected_BL[:, -1:] + self.tolerance
            level_B = good_BL.to(torch.int64).argmax(-1)
        else:
            level_B = torch.full_like(n_B, level)
        return level_B, expected_BL.gather(1, level_B[:, None])[:, 0]


def adaptive_budget(
    knobs: Adaptive, head: AdaptiveHead | None, level: int | None, scores_BP: Tensor, usable_BP: Tensor, k: int
) -> tuple[Tensor, Tensor | None]:
    """How many of k tokens each picture's content deserves [B], and the loss that a head expects of them [B].

    `level` takes the head's choice away from it.
    """
    counts = [max(1, int(share * k)) for share in knobs.levels]
    if head is not None:
        level_B, expected_B = head(scores_BP, usable_BP, level)
        return torch.tensor(counts, device=scores_BP.device)[level_B], expected_B
    with torch.no_grad():
        if knobs.mode == "entropy":
            return count_by_entropy(scores_BP, usable_BP, counts, knobs.temperature), None
        return torch.full_like(usable_BP[:, 0], k, dtype=torch.int64), None
