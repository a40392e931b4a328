"""Relevance providers: how relevant each token is to the question, in a space that the provider names.

docs/method.md, "Relevance". A provider computes [B, N] float32 from features with one layout. A provider that does not
fit the model raises; spaces are never matched by their width.

Shape letters: B prompts, N source tokens, Q question tokens, L text positions, D width.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, SiglipModel

from lavida_adapter.vision import VisionTower
from shirg import MissingFileError, UserError, VisionFeatures, saliency, send
from shirg.similarity import Aggregate, question_cosines
from shirg.validation import one_of

Projector = Literal["base", "adapted"]
"""The projector without the changes of a trained adapter, or with them."""


@dataclass(frozen=True)
class RelevanceContext:
    """What a provider may read besides the encoder states."""

    projected: Callable[[], Tensor]
    """Returns the projected tokens [B, N, D] of the same pictures; they are computed once."""
    questions: Sequence[Tensor]
    """Token ids [Q] of each question: the question alone, without template or suffix."""
    embedding: nn.Embedding
    """The language model's input embedding."""
    texts: Sequence[str] = ()
    """The questions as text."""
    tower: VisionTower | None = None
    """The model's vision tower."""
    base_projected: Callable[[], Tensor] | None = None
    """As `projected`, by the projector as it was before an adapter changed it; None where none did."""


class Relevance(Protocol):
    """A provider; `space` names where its similarity is measured."""

    space: str

    @property
    def reads_question(self) -> bool:
        """Whether the numbers depend on the question."""
        ...

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor: ...


class NoRelevance:
    """Query-agnostic saliency: 1 - cos(x_i, mean x) over the picture's valid encoder states."""

    space = "encoder"
    reads_question = False

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        return saliency(features.tokens_BND, features.valid_BN)


def mean_row(weight_WD: Tensor, rows: int = 8192) -> Tensor:
    """The mean [D] over the rows of a table, in float32; so many rows at a time.

    On a CPU torch would copy the whole table to float32: 2 GB for the published vocabulary.
    """
    total_D = torch.zeros(weight_WD.shape[1], dtype=torch.float32, device=weight_WD.device)
    for part_RD in weight_WD.split(rows):
        total_D += part_RD.sum(0, dtype=torch.float32)
    return total_D / len(weight_WD)


class MeanWord:
    """The mean of all word embeddings, computed again only after they have changed."""

    def __init__(self) -> None:
        self._known: tuple[Any, Tensor] | None = None

    def __call__(self, weight_WD: Tensor) -> Tensor:
        """float32 [D]."""
        if weight_WD.is_inference():  # such a tensor does not count its changes
            return mean_row(weight_WD)
        state = weight_WD.data_ptr(), weight_WD._version, weight_WD.dtype, weight_WD.device
        if self._known is None or self._known[0] != state:
            with torch.no_grad():
                self._known = state, mean_row(weight_WD)
        return self._known[1]


class LmEmbed:
    """Cosine of projected tokens and the question's word embeddings, both centred, in the language model's space.

    Args:
        agg: how the question's tokens count.
        projector: which one projects the tokens; "base" is the model's own without a trained adapter's changes, which
            were not made for this cosine. The prefix is always that of the adapted one.
    """

    space = "lm"
    reads_question = True

    def __init__(self, *, agg: Aggregate = "mean", projector: Projector = "adapted") -> None:
        one_of("relevance.agg", agg, Aggregate)
        one_of("relevance.projector", projector, Projector)
        self.agg, self.projector = agg, projector
        self._mean_word = MeanWord()

    @torch.no_grad()
    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        at = range(len(features.ids)) if features.picture_at is None else features.picture_at
        row_of = {picture: row for row, picture in enumerate(at)}  # all rows of a picture are equal
        base = context.base_projected if self.projector == "base" else None
        p, valid = (base or context.projected)(), features.valid_BN
        mean_D = self._mean_word(context.embedding.weight)
        rows: dict[int, Tensor] = {}
        for picture, row in row_of.items():
            asking = [i for i, other in enumerate(at) if other == picture]
            if not all(len(context.questions[i]) for i in asking):
                raise UserError("relevance=lm_embed needs a question, and this one has no tokens: use relevance=none")
            words = [context.embedding(context.questions[i]) for i in asking]
            # One picture at a time: in float32 the tokens of a batch take gigabytes.
            rows |= zip(asking, question_cosines(p[row], words, self.agg, valid[row], mean_D), strict=True)
        return torch.stack([rows[i] for i in range(len(at))])


class External:
    """Relevance from a file or a mapping: sample id -> one number per source token."""

    space = "external"
    reads_question = False

    def __init__(self, *, path: str | Path | None = None, scores: dict[str, Tensor] | None = None) -> None:
        if (path is None) == (scores is None):
            raise UserError("relevance=external needs relevance.path, a safetensors file of sample id -> [N] scores")
        if path is not None:
            if not os.path.isfile(path):
                raise MissingFileError(f"relevance.path={path!s:.200}: no such file")
            try:
                scores = load_file(path)
            except SafetensorError as error:
                raise UserError(f"relevance.path={path} is not a readable safetensors file: {error}") from error
        self.scores = scores or {}

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        n = features.layout.n_tokens
        for sample in features.ids:
            if sample not in self.scores:
                raise UserError(f"relevance=external has no scores for sample {sample!r}")
            if self.scores[sample].shape != (n,):
                raise UserError(
                    f"relevance=external: the scores of sample {sample!r} have shape "
                    f"{tuple(self.scores[sample].shape)}, its canvas has {n} tokens"
                )
        return send(torch.stack([self.scores[i].float() for i in features.ids]), features.tokens_BND.device)


CHECKED = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
"""Weights in which the two towers are compared, besides the norms of the last layer that both have."""


class SiglipText:
    """Cosine between each token, passed through the rest of SigLIP, and the question's pooled text feature."""

    space, reads_question = "siglip", True

    def __init__(self, *, path: str | Path, tolerance: float = 0.1) -> None:
        """Loads a whole SigLIP with text tower and tokenizer from a folder or a hub id.

        `tolerance`: the largest relative distance of a weight of LaViDa's tower from SigLIP's. LaViDa trained the tower
        a little; the distance to an unrelated tower is more than 1.
        """
        if not tolerance >= 0:
            raise UserError(f"relevance.tolerance={tolerance}: give a number >= 0")
        if str(path).startswith((".", "/")) and not os.path.isdir(path):
            raise MissingFileError(f"relevance.path={path!s:.200}: no SigLIP checkpoint there")
        self.tolerance = tolerance
        self.siglip = SiglipModel.from_pretrained(path).eval().requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._checked: VisionTower | None = None

    @torch.no_grad()
    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        self._check(context.tower)
        self.siglip.to(features.tokens_BND.device)
        value_BND = self._to_text_space(features)
        text_BD = self._texts(context.texts, value_BND.device)
        return F.cosine_similarity(value_BND, text_BD[:, None], dim=-1)

    def _to_text_space(self, features: VisionFeatures) -> Tensor:
        """Tokens [B, N, D] in the space in which SigLIP compares pictures and texts; views are independent."""
        vision, views = self.siglip.vision_model, features.layout.n_views
        x = features.tokens_BND.float().unflatten(1, (views, -1)).flatten(0, 1)
        x = vision.post_layernorm(vision.encoder.layers[-1](x, attention_mask=None))
        pool = vision.head.attention
        # The head's attention averages the values of tokens; a single token's value is its own contribution.
        weight_DD, bias_D = pool.in_proj_weight.chunk(3)[2], pool.in_proj_bias.chunk(3)[2]
        x = pool.out_proj(F.linear(x, weight_DD, bias_D))
        x = x + vision.head.mlp(vision.head.layernorm(x))
        return x.unflatten(0, (-1, views)).flatten(1, 2)

    def _texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Pooled text features [B, D]; texts are padded and cut to the full length, as in SigLIP's training."""
        length = self.siglip.config.text_config.max_position_embeddings
        ids_BL = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        return self.siglip.text_model(input_ids=send(ids_BL, device)).pooler_output

    def _check(self, tower: VisionTower | None) -> None:
        """Raises UserError unless the model's tower is this SigLIP's without its last layer."""
        if tower is None:
            raise UserError(
                "relevance=siglip_text compares the model's vision tower: RelevanceContext.tower is None, pass it"
            )
        if tower is self._checked:
            return
        ours, theirs = tower.config, self.siglip.config.vision_config
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"relevance=siglip_text: the model's tower has {name}={getattr(ours, name)}, the SigLIP at "
                    f"relevance.path has {getattr(theirs, name)}; give the SigLIP that the tower was made from"
                )
        kept = tower.vision_tower.vision_model.state_dict()
        last = len(tower.layers) - 1
        given = self.siglip.vision_model.state_dict()
        for name in (*CHECKED, *(f"encoder.layers.{last}.layer_norm{i}.weight" for i in (1, 2))):
            original = given[name].float().cpu()
            moved = (kept[name].float().cpu() - original).norm() / original.norm()
            if not moved <= self.tolerance:
                raise UserError(
                    f"relevance=siglip_text: {name} of the model's tower is {float(moved):.2g} away from the SigLIP at "
                    f"relevance.path, more than relevance.tolerance={self.tolerance}; its last layer would not fit"
                )
        self._checked = tower
