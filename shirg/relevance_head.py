"""A small head that learns which tokens matter for a question (docs/method.md, "Learned relevance").

It has no access to a model: states, words and a base relevance come in, scores go out.

Shape letters: B prompts, N source tokens, Q question tokens, D state width, W word width, H hidden width.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shirg.similarity import SHORTEST
from shirg.validation import UserError

PACE = 16.0
"""The gain of the base relevance is this times its parameter, and so adapts before the rest has learned much: it grows
where the base is right, which keeps the words that training never shows, and vanishes where it is noise."""
STEP = 512.0
"""Over D sqrt(W), it makes a step of Adam move a score by about as much at every width: by at most STEP x the rate."""
FLAT = 1e-6
"""A channel with a smaller standard deviation counts as one of this."""


class RelevanceHead(nn.Module):
    """score_i = PACE gain z(base_i) + STEP x_i^T M q / (D sqrt(W)) + MLP(x_i), of standardised encoder states x_i.

    It starts as the base alone: M and the last layer of the MLP are zero. What it has not learned, such as a word that
    training never showed, so keeps the base's ranking, as far as what it has learned does not outweigh it.

    M is a whole matrix. As a product of two thin ones it costs more at selection, and does not learn most of the words
    where the base knows none (docs/results/learned/decisions.md).

    Args:
        states: width of the encoder states.
        words: width of the word embeddings.
        hidden: width of the MLP's hidden layer, which sees the picture alone.
        question: whether there is a matrix that reads the question; the base may read it in any case.
        base: whether there is a relevance that the head corrects.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, *, states: int, words: int, hidden: int = 32, question: bool = True, base: bool = True) -> None:
        super().__init__()
        for name, value in {"states": states, "words": words, "hidden": hidden}.items():
            if type(value) is not int or not 0 < value <= 65_536:
                raise UserError(f"head.{name}={value!r:.40}: give a whole number from 1 to 65,536")
        for name, flag in {"question": question, "base": base}.items():
            if type(flag) is not bool:
                raise UserError(f"head.{name}={flag!r:.40}: give true or false")
        self.options = {"states": states, "words": words, "hidden": hidden, "question": question, "base": base}
        self.reads_question, self.has_base = question, base
        self.first = nn.Linear(states, hidden)
        self.last = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.last.weight)
        if question:
            self.match_DW = nn.Parameter(torch.zeros(states, words))
        if base:
            self.gain = nn.Parameter(torch.tensor(1 / PACE))
        self.register_buffer("mean_D", torch.zeros(states))
        self.register_buffer("std_D", torch.ones(states))

    @torch.no_grad()
    def standardise_by(self, states: Iterable[Tensor]) -> None:
        """Takes mean and standard deviation of each channel from states, given in parts [M, D] without padding."""
        zeros_D = torch.zeros(len(self.mean_D), dtype=torch.float64, device=self.mean_D.device)
        n, sum_D, squares_D = 0, zeros_D.clone(), zeros_D.clone()
        for part_MD in states:
            wide_MD = part_MD.double()
            n, sum_D, squares_D = n + len(wide_MD), sum_D + wide_MD.sum(0), squares_D + wide_MD.square().sum(0)
        mean_D = sum_D / n
        self.mean_D.copy_(mean_D)
        self.std_D.copy_((squares_D / n - mean_D.square()).clamp_min(0).sqrt().clamp_min(FLAT))

    def forward(
        self, states_BND: Tensor, valid_BN: Tensor, question_BW: Tensor | None, base_BN: Tensor | None
    ) -> Tensor:
        """Scores [B, N], float32 with a graph.

        `question_BW`: `question_vector` of each prompt; `base_BN`: the relevance that is corrected.
        """
        # The states are standardised inside the weights: at true size this saves passes over all tokens.
        states_BND, weight_HD = states_BND.float(), self.first.weight / self.std_D
        hidden_BNH = F.linear(states_BND, weight_HD, self.first.bias - weight_HD @ self.mean_D)
        score_BN: Tensor = self.last(F.gelu(hidden_BNH))[..., 0]
        if self.reads_question:
            assert question_BW is not None
            d, w = self.match_DW.shape
            asked_BD = F.linear(question_BW.float(), self.match_DW) / self.std_D * (STEP / (d * math.sqrt(w)))
            score_BN = score_BN + (states_BND @ asked_BD[..., None])[..., 0] - asked_BD @ self.mean_D[:, None]
        if self.has_base:
            assert base_BN is not None
            score_BN = score_BN + PACE * self.gain * standardised(base_BN, valid_BN)
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
