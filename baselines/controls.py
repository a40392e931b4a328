"""Controls: all tokens, random tokens, the largest norms, the global view alone (docs/method.md, "Selectors")."""

from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from shirg import (
    Budget,
    Geometry,
    Selection,
    Selector,
    UserError,
    VisionFeatures,
    close_rows,
    keep,
    send,
    stable_topk,
    used_rows,
)
from shirg.validation import one_of


class Full(Selector):
    """Every token that is not padding, in reading order: the upper bound of information and of cost.

    Args:
        newline: "row" closes each canvas row, or a single view, by a NEWLINE slot, as the base model does where it does
            not pool; "none" leaves them out.
        geometry: how the picture is cut into views; overlapping crops keep their duplicates.
    """

    def __init__(self, *, newline: Literal["none", "row"] = "row", geometry: Geometry = "lavida_tiles") -> None:
        super().__init__(budget=None, geometry=geometry)
        one_of("newline", newline, Literal["none", "row"])
        self.newline = newline

    def select(self, features: VisionFeatures) -> Selection:
        valid_BN = features.valid_BN
        valid_first = stable_topk(valid_BN.float(), features.layout.n_tokens)
        chosen = keep(features, valid_first, valid_BN.sum(-1))
        return close_rows(chosen, features, used_rows(features.layout, valid_BN)) if self.newline == "row" else chosen


class Random(Selector):
    """Tokens drawn uniformly from all that are not padding: every method must do better.

    Each picture has a generator of its own, seeded by `seed` and the sample's id, so that its tokens depend neither on
    the batch, the order or the worker, nor on the global random state. Ranks in reading order are drawn, so that the
    numbering of the views does not matter either. `geometry` is how the picture is cut into views, so that a method can
    be compared with random tokens of its own geometry.
    """

    reads_sample = True

    def __init__(self, *, budget: Budget, seed: int = 0, geometry: Geometry = "lavida_tiles") -> None:
        super().__init__(budget=budget, geometry=geometry)
        self.seed = seed

    def score(self, features: VisionFeatures) -> Tensor:
        layout = features.layout
        rows = [torch.randperm(layout.n_tokens, generator=self._generator(sample)) for sample in features.ids]
        drawn_BN = send(torch.stack(rows).float(), features.valid_BN.device)
        return drawn_BN[:, layout.rank_N]

    def _generator(self, sample: str) -> torch.Generator:
        digest = blake2b(f"{self.seed}/{sample}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class NormTopK(Selector):
    """Keeps the tokens with the largest norm. A weak control: SigLIP's tokens with the largest norms are artefacts.

    Args:
        budget: tokens per picture.
        sign: -1 keeps the smallest norms.
    """

    def __init__(self, *, budget: Budget, sign: int = 1) -> None:
        super().__init__(budget=budget)
        one_of("sign", sign, Literal[-1, 1])
        self.sign = sign

    def score(self, features: VisionFeatures) -> Tensor:
        return self.sign * features.tokens_BND.float().norm(dim=-1)


class GlobalOnly(Selector):
    """The whole picture in one view, without tiles: a high resolution must do better. It has no budget."""

    def __init__(self) -> None:
        super().__init__(budget=None)

    def select(self, features: VisionFeatures) -> Selection:
        n = features.layout.n_global
        if not n:
            raise UserError("GlobalOnly: these features have no view of the whole picture; choose another selector")
        first_BN = features.layout.order_N[:n].expand(len(features.ids), -1)
        valid_BN = features.valid_BN.gather(1, first_BN)
        return keep(features, first_BN.gather(1, stable_topk(valid_BN.float(), n)), valid_BN.sum(-1))
