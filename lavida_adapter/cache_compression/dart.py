"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494) on a prefix cache.

The paper does not look for important tokens but avoids duplicates: it takes a few tokens as pivots and adds, for each
pivot, the picture tokens that are least similar to it. No attention map is read. Here this is done after the prefill,
and the other rows are cut from every layer's cache (docs/method.md, "dart").

Shape letters: B batch, P prefix slots, D width, J pivots, M rows that the largest share of a pivot has.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.cache_compression.compressor import CacheSelector, FirstStep, Positions
from lavida_adapter.cache_compression.prompt_rows import (
    check_depth,
    check_layer,
    gather_rows,
    prompt_states,
    text_behind,
)
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.prefix import Prefix
from shirg import Budget, UserError, send, stable_topk


class DART(CacheSelector):
    """Keeps the picture pivots, and for each pivot the picture rows that are least similar to it.

    Pivots are the rows of the largest L1 key norm in the layer before `layer`: some of the picture, some of the text
    behind it. Similarity is the cosine of the states at the input of `layer`, after the model's final norm.
    """

    after: ClassVar[Literal["prefill", "first_step"]] = "prefill"

    def __init__(
        self,
        *,
        budget: Budget,
        layer: int = 2,
        pivots_picture: int = 4,
        pivots_text: int = 4,
        positions: Positions = "retain",
    ) -> None:
        """`layer`: the one that the paper prunes in front of, counted from 0; layer 0 has no keys before it."""
        super().__init__(budget=budget, positions=positions)
        self.layer = check_layer(layer, first=1)
        for option, n, least in (("pivots_picture", pivots_picture, 1), ("pivots_text", pivots_text, 0)):
            if isinstance(n, bool) or not isinstance(n, int) or n < least:
                raise UserError(f"{option}={n!r}: give a whole number, {least} or more")
        self.pivots_picture, self.pivots_text = pivots_picture, pivots_text

    def counts(self, prefix: Prefix) -> tuple[int, ...]:
        wanted = super().counts(prefix)
        if min(wanted) < self.pivots_picture:
            raise UserError(
                f"DART: budget {min(wanted)} is smaller than pivots_picture={self.pivots_picture}, and picture pivots "
                "always stay: raise cache.budget= or lower cache.pivots_picture="
            )
        return wanted

    def score(self, lm: LanguageModel, cache: PrefixCache, prefix: Prefix, first: FirstStep | None) -> Tensor:
        """1 for the rows that stay, 0 for the others: there is no order among them."""
        check_depth(self.layer, lm)
        norm_BP = cache.keys[self.layer - 1].float().abs().sum(dim=(1, 3))
        behind_BP = text_behind(prefix, type(self).__name__)
        picture_BJ = _largest(norm_BP, prefix.visual_BP, self.pivots_picture)
        pivot_BJ = torch.cat([picture_BJ, _largest(norm_BP, behind_BP, self.pivots_text)], dim=1)
        share_BJ = send(self._shares(prefix, pivot_BJ.shape[1]), norm_BP.device)
        states_BPD = F.normalize(lm.final_norm(prompt_states(lm, cache, prefix.embeds_BPD, self.layer)).float(), dim=-1)
        kept_BP = torch.zeros_like(behind_BP).scatter(1, picture_BJ, True)
        cosine_BJP = gather_rows(states_BPD, pivot_BJ) @ states_BPD.transpose(1, 2)
        largest = max(self.counts(prefix))
        for j in range(pivot_BJ.shape[1]):
            free_BP = prefix.visual_BP & ~kept_BP
            least_BM = stable_topk((-cosine_BJP[:, j]).masked_fill(~free_BP, float("-inf")), largest)
            taken_BM = torch.arange(least_BM.shape[1], device=least_BM.device) < share_BJ[:, j, None]
            kept_BP = kept_BP | torch.zeros_like(kept_BP).scatter(1, least_BM, taken_BM)
        return kept_BP.float()

    def _shares(self, prefix: Prefix, n_slots: int) -> Tensor:
        """How many rows each pivot adds [B, J]; 0 for text pivots that a short text does not have.

        The shares are equal, and the first pivots add one more where the rows cannot be divided.
        """
        rows = []
        for count, n_text in zip(self.counts(prefix), prefix.n_behind, strict=True):
            n_pivots = self.pivots_picture + min(self.pivots_text, n_text)
            base, more = divmod(count - self.pivots_picture, n_pivots)
            rows.append([base + (j < more) if j < n_pivots else 0 for j in range(n_slots)])
        return torch.tensor(rows)


def _largest(norm_BP: Tensor, among_BP: Tensor, n: int) -> Tensor:
    """The slots of the n largest norms in `among_BP`, largest first; behind them slots of others, if it has fewer."""
    return stable_topk(norm_BP.masked_fill(~among_BP, float("-inf")), n)
