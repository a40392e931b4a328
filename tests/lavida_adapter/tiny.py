"""A LaViDa with random weights, small in everything but its structure: five canvases, views of 3 x 3 tokens."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.data.synthetic.tokenizer import build_tokenizer
from lavida_adapter import DreamConfig, Lavida, LavidaConfig, LladaConfig, VisionConfig

VIEW, PATCH = 20, 6
"""Two of 20 pixels are left over at the right and bottom of a view, as 6 of 384 are in the real model."""
CANVASES = ((20, 40), (40, 20), (40, 40), (60, 20), (20, 60))
SIZES = ((40, 40), (30, 22), (38, 16), (100, 26), (12, 70))
"""Pictures (w, h) that between them use canvases of three, four and five views, with and without padding."""


@cache
def tokenizer(family: str = "llada") -> PreTrainedTokenizerFast:
    return build_tokenizer(family)


def tiny_config(*, lm: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **own: Any) -> LavidaConfig:
    """Torch's own initialisation and wide embeddings make the logits of random weights differ clearly."""
    name = (lm or {}).get("family", "llada")
    words, family = tokenizer(name), {"llada": LladaConfig, "dream": DreamConfig}[name]
    small = family(
        d_model=32,
        n_heads=4,
        n_kv_heads=4 if family is LladaConfig else 2,
        n_layers=2,
        mlp_hidden_size=48,
        max_sequence_length=512,
        vocab_size=len(words),
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
        mask_token_id=words.mask_token_id,
        init_std=None,
        emb_std=1.0,
    )
    tower = VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=VIEW,
        patch_size=PATCH,
    )
    defaults: dict[str, Any] = {"image_grid_pinpoints": CANVASES, "system_prompt": "Be brief.", "trained": False}
    return LavidaConfig(vision=replace(tower, **(vision or {})), lm=replace(small, **(lm or {})), **defaults | own)


def tiny_model(seed: int = 0, **changes: Any) -> Lavida:
    """A fresh model; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(**changes)
        return Lavida(config, tokenizer(config.lm.family)).eval()


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Coloured noise, so that every token of every picture is different."""
    generator = torch.Generator().manual_seed(1000 * seed + 31 * size[0] + size[1])
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
