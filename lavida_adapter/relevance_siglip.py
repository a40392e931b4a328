"""Relevance in SigLIP's own space of pictures and texts.

docs/method.md, "Relevance". LaViDa's tower ends before SigLIP's last layer, and its states are in no space that a text
is in. The rest of SigLIP takes them there: the last layer, the final norm and the pooling head, whose attention is left
out so that each token keeps a value of its own (Zhou et al. 2022, "Extract Free Dense Labels from CLIP",
arXiv 2112.01071).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, SiglipModel

from lavida_adapter.relevance import RelevanceContext
from lavida_adapter.vision import VisionTower
from shirg import VisionFeatures

CHECKED = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
"""What is compared of the two towers, beside the norms of the last layer that both have."""


class SiglipText:
    """Cosine of each token, taken through the rest of SigLIP, and the question's pooled text feature."""

    space = "siglip"

    def __init__(self, *, path: str | Path, tolerance: float = 0.1) -> None:
        """Loads a whole SigLIP, text tower and tokenizer included, from a folder or a hub id.

        `tolerance` is how far, relative to its size, a weight of LaViDa's tower may have moved from SigLIP's: LaViDa
        trained it a little, and weights that never were SigLIP's are more than 1 away.
        """
        if not tolerance >= 0:
            raise ValueError(f"relevance.tolerance={tolerance}: give a number >= 0")
        if str(path).startswith((".", "/")) and not Path(path).is_dir():
            raise FileNotFoundError(f"relevance.path={path}: there is no SigLIP checkpoint")
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
        """Tokens [B, N, D] where SigLIP compares pictures with texts; views know nothing of one another."""
        vision, views = self.siglip.vision_model, features.layout.n_views
        x = features.tokens_BND.float().unflatten(1, (views, -1)).flatten(0, 1)
        x = vision.post_layernorm(vision.encoder.layers[-1](x, attention_mask=None))
        pool = vision.head.attention
        # The head's attention averages values over tokens; a token's own value is what it would contribute alone.
        weight_DD, bias_D = pool.in_proj_weight.chunk(3)[2], pool.in_proj_bias.chunk(3)[2]
        x = pool.out_proj(F.linear(x, weight_DD, bias_D))
        x = x + vision.head.mlp(vision.head.layernorm(x))
        return x.unflatten(0, (-1, views)).flatten(1, 2)

    def _texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Pooled text features [B, D]; padded to the full length, as SigLIP was trained, and cut there."""
        length = self.siglip.config.text_config.max_position_embeddings
        ids_BL = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        return self.siglip.text_model(input_ids=ids_BL.to(device)).pooler_output

    def _check(self, tower: VisionTower | None) -> None:
        """Raises ValueError unless the model's tower is this SigLIP's, but for its last layer."""
        if tower is None:
            raise ValueError("relevance=siglip_text needs to know the model's vision tower: Context.tower is None")
        if tower is self._checked:
            return
        ours, theirs = tower.config, self.siglip.config.vision_config
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
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
                raise ValueError(
                    f"relevance=siglip_text: {name} of the model's tower is {float(moved):.2g} away from the SigLIP at "
                    f"relevance.path, more than relevance.tolerance={self.tolerance}; its last layer would not fit"
                )
        self._checked = tower
