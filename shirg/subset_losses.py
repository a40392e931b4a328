"""What a relevance head learns from: random subsets of tokens, and the model's loss with each of them.

docs/method.md, "Learned relevance". All functions are of plain tensors; the losses come from forward passes alone.

Shape letters: B questions, M subsets of each, N source tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST, MOST = 1e-12, 1 - 1e-4
"""Probabilities are kept between these. Below the first there is no gradient: it must lie below those of long answers,
which are improbable with every subset."""


def subset_sums(score_BN: Tensor, member_BMN: Tensor) -> Tensor:
    """[B, M]: the summed scores of each subset's members."""
    return (score_BN[:, None] * member_BMN).sum(-1)


def subset_shares(score_BN: Tensor, member_BMN: Tensor, competing_BN: Tensor) -> Tensor:
    """[B, M]: each subset's share of the softmax of all tokens that compete."""
    share_BN = score_BN.masked_fill(~competing_BN, float("-inf")).softmax(-1)
    return (share_BN[:, None] * member_BMN).sum(-1)


def answer_probabilities(share_BM: Tensor, odds_B2: Tensor) -> Tensor:
    """[B, M]: low + (high - low) share, how probable the answer is with each subset.

    A question is answered well where the subset holds the tokens that the scores point at, a form of multiple-instance
    learning. `odds_B2`: low and high, the probabilities without and with all of them.
    """
    low_B1, high_B1 = odds_B2[:, :1], odds_B2[:, 1:]
    return (low_B1 + (high_B1 - low_B1) * share_BM).clamp(LEAST, MOST)


def regression_loss(log_p_BM: Tensor, loss_BM: Tensor) -> Tensor:
    """Mean squared error of a prediction of minus the loss, both centred over the M subsets.

    Only the differences between subsets of one question count: how hard the question is drops out. What predicts are
    summed scores, or the logarithm of `answer_probabilities`.
    """
    predicted_BM = log_p_BM - log_p_BM.mean(-1, keepdim=True)
    observed_BM = loss_BM.mean(-1, keepdim=True) - loss_BM
    return (predicted_BM - observed_BM).square().mean()


def mil_loss(p_BM: Tensor, loss_BM: Tensor) -> Tensor:
    """Binary cross entropy between `answer_probabilities` and the observed exp(-loss)."""
    return F.binary_cross_entropy(p_BM, (-loss_BM).exp().clamp(0, 1))


class Odds(nn.Module):
    """How probable a question's answer is without and with its tokens: low < high, from the question alone.

    Trained beside a head, and not needed after that.

    Args:
        words: width of a question vector.
    """

    def __init__(self, *, words: int) -> None:
        super().__init__()
        self.linear = nn.Linear(words, 2)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor([-2.0, 2.0]))  # low 0.12, high 0.89

    def forward(self, question_BW: Tensor) -> Tensor:
        """[B, 2]: low and high."""
        x_B2 = self.linear(question_BW.float()).sigmoid()
        low_B = x_B2[:, 0]
        return torch.stack([low_B, low_B + (1 - low_B) * x_B2[:, 1]], dim=-1)


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel noise, float32 on the generator's device: the top K of scores plus noise are a random subset of size K.

    With equal scores every subset is equally likely (Kool et al. 2019, arXiv 1903.06059).
    """
    u = torch.rand(shape, generator=generator, device=generator.device).clamp(1e-9, 1 - 1e-6)
    return -(-u.log()).log()
