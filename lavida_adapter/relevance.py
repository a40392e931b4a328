"""How relevant each token is to the question: providers, each in a space that it names.

docs/method.md, "Relevance". A provider computes [B, N] float32 from features of one canvas kind. Spaces are never mixed
and never matched by width: a provider that cannot work with a model says so when it is built.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lavida_adapter.vision import VisionTower
from shirg import VisionFeatures

Aggregate = Literal["mean", "max", "pooled"]


@dataclass(frozen=True)
class RelevanceContext:
    """What a provider may look at beside the encoder states."""

    projected: Callable[[], Tensor]
    """The projected tokens [B, N, D] of the same pictures; computed once, however many ask."""
    questions: Sequence[Tensor]
    """Token ids [Q] of each question: the question alone, without template or suffix."""
    embedding: nn.Embedding
    """The language model's input embedding."""
    texts: Sequence[str] = ()
    """The questions as they are written."""
    tower: VisionTower | None = None
    """The model's vision tower."""


class Relevance(Protocol):
    """A provider; `space` names where its similarity is measured."""

    space: str
    reads_question: bool
    """Whether another question gives other numbers."""

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor: ...


class NoRelevance:
    """Query-agnostic saliency: 1 - cos(x_i, mean x) over the picture's valid encoder states."""

    space = "encoder"
    reads_question = False

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        x = features.tokens_BND.detach().float()
        mean_B1D = masked_mean(x, features.valid_BN)
        return 1 - F.cosine_similarity(x, mean_B1D, dim=-1)


class LmEmbed:
    """Cosine of projected tokens and the question's word embeddings, both centred, in the language model's space."""

    space = "lm"
    reads_question = True

    def __init__(self, *, agg: Aggregate = "mean") -> None:
        if agg not in ("mean", "max", "pooled"):
            raise ValueError(f"relevance.agg={agg!r}: choose mean, max or pooled")
        self.agg = agg

    @torch.no_grad()
    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        at = range(len(features.ids)) if features.picture_at is None else features.picture_at
        row_of = {picture: row for row, picture in enumerate(at)}  # any row of a picture has all there is to know of it
        p, valid = context.projected(), features.valid_BN
        if len(row_of) < len(at):
            p, valid = (values[list(row_of.values())] for values in (p, valid))
        p = F.normalize(p.float() - masked_mean(p.float(), valid), dim=-1)
        by_picture = dict(zip(row_of, p, strict=True))
        vocabulary_mean_D = context.embedding.weight.mean(0, dtype=torch.float32)
        rows = []
        for picture, ids_Q in zip(at, context.questions, strict=True):
            p_ND = by_picture[picture]
            if not len(ids_Q):
                raise ValueError("relevance=lm_embed needs a question, and this one has no tokens: use relevance=none")
            q_QD = context.embedding(ids_Q).float() - vocabulary_mean_D
            q_QD = F.normalize(q_QD.mean(0, keepdim=True) if self.agg == "pooled" else q_QD, dim=-1)
            r_NQ = p_ND @ q_QD.T
            rows.append(r_NQ.amax(-1) if self.agg == "max" else r_NQ.mean(-1))
        return torch.stack(rows)


class External:
    """Relevance from a file or a mapping: sample id -> one number per source token."""

    space = "external"
    reads_question = False

    def __init__(self, *, path: str | Path | None = None, scores: dict[str, Tensor] | None = None) -> None:
        if (path is None) == (scores is None):
            raise ValueError("relevance=external needs relevance.path, a safetensors file of sample id -> [N] scores")
        if path is not None:
            if not Path(path).is_file():
                raise FileNotFoundError(f"relevance.path={path}: no such file")
            try:
                scores = load_file(path)
            except SafetensorError as error:
                raise ValueError(f"relevance.path={path} is not a readable safetensors file: {error}") from error
        self.scores = scores or {}

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        n = features.layout.n_tokens
        for sample in features.ids:
            if sample not in self.scores:
                raise ValueError(f"relevance=external has no scores for sample {sample!r}")
            if self.scores[sample].shape != (n,):
                raise ValueError(
                    f"relevance=external: the scores of sample {sample!r} have shape "
                    f"{tuple(self.scores[sample].shape)}, its canvas has {n} tokens"
                )
        return torch.stack([self.scores[i] for i in features.ids]).to(features.tokens_BND.device, torch.float32)


def masked_mean(x_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """Mean over valid tokens [B, 1, D]."""
    weight_BN1 = valid_BN[..., None].to(x_BND.dtype)
    return (x_BND * weight_BN1).sum(1, keepdim=True) / weight_BN1.sum(1, keepdim=True).clamp_min(1)
