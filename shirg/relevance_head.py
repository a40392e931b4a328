"""A small head that learns which tokens matter for a question (docs/method.md, "Learned relevance").

It has no access to a model: states, words and a base relevance come in, scores go out.

Shape letters: B prompts, N source tokens, Q question tokens, D state width, W word width, R rank, H hidden width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shirg.similarity import SHORTEST
from shirg.validation import UserError

FIRST_GAIN = 0.1
"""Of the base relevance in an untrained head: small beside what is learned, since a ranking has no scale."""
FLAT = 1e-6
"""A channel with a smaller standard deviation counts as one of this."""


class RelevanceHead(nn.Module):
    """score_i = gain z(base_i) + <A x_i, B q> / sqrt(rank) + MLP(x_i), of standardised encoder states x_i.

    It starts as the base alone: B and the last layer of the MLP are zero. What it has not learned, such as a word that
    training never showed, so keeps the base's ranking, as far as what it has learned does not outweigh it.

    Args:
        states: width of the encoder states.
        words: width of the word embeddings.
        rank: of the product of state and question; it is not used without `question`.
        hidden: width of the MLP's hidden layer, which sees the picture alone.
        question: whether the question is read.
        base: whether there is a relevance that the head corrects.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(
        self, *, states: int, words: int, rank: int = 32, hidden: int = 32, question: bool = True, base: bool = True
    ) -> None:
        super().__init__()
        for name, value in {"states": states, "words": words, "rank": rank, "hidden": hidden}.items():
            if type(value) is not int or not 0 < value <= 65_536:
                raise UserError(f"head.{name}={value!r:.40}: give a whole number from 1 to 65,536")
        for name, flag in {"question": question, "base": base}.items():
            if type(flag) is not bool:
                raise UserError(f"head.{name}={flag!r:.40}: give true or false")
        self.options = {"states": states, "words": words, "rank": rank, "hidden": hidden}
        self.options |= {"question": question, "base": base}
        self.reads_question, self.has_base = question, base
        self.first = nn.Linear(states, hidden)
        self.last = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.last.weight)
        if question:
            self.of_state = nn.Linear(states, rank, bias=False)
            self.of_question = nn.Linear(words, rank, bias=False)
            nn.init.zeros_(self.of_question.weight)
        if base:
            self.gain = nn.Parameter(torch.tensor(FIRST_GAIN))
        self.register_buffer("mean_D", torch.zeros(states))
        self.register_buffer("std_D", torch.ones(states))

    @torch.no_grad()
    def standardise_by(self, states_MD: Tensor) -> None:
        """Takes mean and standard deviation of each channel from these states, which are not padding."""
        self.mean_D.copy_(states_MD.float().mean(0))
        self.std_D.copy_(states_MD.float().std(0, correction=0).clamp_min(FLAT))

    def forward(
        self, states_BND: Tensor, valid_BN: Tensor, question_BW: Tensor | None, base_BN: Tensor | None
    ) -> Tensor:
        """Scores [B, N], float32 with a graph.

        `question_BW`: `question_vector` of each prompt; `base_BN`: the relevance that is corrected.
        """
        learned = [self.first.weight, *([self.of_state.weight] if self.reads_question else [])]
        # The states are standardised inside the weights: at true size this saves three passes over all tokens.
        weight_XD = torch.cat(learned) / self.std_D
        bias_X = F.pad(self.first.bias, (0, len(weight_XD) - len(self.first.bias))) - weight_XD @ self.mean_D
        both_BNX = F.linear(states_BND.float(), weight_XD, bias_X)
        hidden = self.first.out_features
        score_BN: Tensor = self.last(F.gelu(both_BNX[..., :hidden]))[..., 0]
        if self.reads_question:
            assert question_BW is not None
            asked_BR1 = self.of_question(question_BW.float())[..., None]
            rank = self.of_state.out_features
            score_BN = score_BN + (both_BNX[..., hidden:] @ asked_BR1)[..., 0] / math.sqrt(rank)
        if self.has_base:
            assert base_BN is not None
            score_BN = score_BN + self.gain * standardised(base_BN, valid_BN)
        return score_BN


def standardised(values_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """float32 [B, N]: mean 0 and variance 1 over the valid values of each row; equal values give 0."""
    values_BN, weight_BN = values_BN.float(), valid_BN.float()
    count_B1 = weight_BN.sum(-1, keepdim=True).clamp_min(1)
    centred_BN = values_BN - (values_BN * weight_BN).sum(-1, keepdim=True) / count_B1
    variance_B1 = (centred_BN.square() * weight_BN).sum(-1, keepdim=True) / count_B1
    return centred_BN / (variance_B1.sqrt() + FLAT)


def question_vector(words: Sequence[Tensor], mean_W: Tensor) -> Tensor:
    """float32 [B, W]: the sum of the centred unit vectors of each question's words [Q, W], over sqrt(Q).

    `mean_W`: the mean of all word embeddings.
    """
    sums = []
    for words_QW in words:
        centred_QW = words_QW.float() - mean_W
        sums.append(F.normalize(centred_QW, dim=-1, eps=SHORTEST).sum(0) / math.sqrt(max(1, len(words_QW))))
    return torch.stack(sums)
