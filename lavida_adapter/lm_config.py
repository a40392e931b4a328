"""Sizes and special tokens of a language model: the fields that every family shares, and each family's defaults.

docs/lavida.md, "Constants". The names are LLaDA's; `lavida_adapter.config` translates those of other families.
"""

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["llada", "dream"]


@dataclass(frozen=True)
class LanguageModelConfig:
    """A masked-diffusion transformer."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    max_sequence_length: int
    rope_theta: float
    rms_norm_eps: float
    eos_token_id: int
    pad_token_id: int
    mask_token_id: int
    init_std: float | None = 0.02
    """Standard deviation of fresh linear layers; None keeps torch's own initialisation."""
    emb_std: float = 0.02
    """Standard deviation of fresh word embeddings."""
    family: FamilyName = "llada"
    """Which architecture and which published layout."""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class LladaConfig(LanguageModelConfig):
    """A LLaDA transformer; the defaults are LLaDA-8B."""

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int = 32
    n_layers: int = 32
    mlp_hidden_size: int = 12288
    vocab_size: int = 126464
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    eos_token_id: int = 126081
    pad_token_id: int = 126081
    mask_token_id: int = 126336


@dataclass(frozen=True)
class DreamConfig(LanguageModelConfig):
    """A Dream transformer, which has the layout of Qwen2.5; the defaults are Dream-7B."""

    d_model: int = 3584
    n_heads: int = 28
    n_kv_heads: int = 4
    n_layers: int = 28
    mlp_hidden_size: int = 18944
    vocab_size: int = 152064
    max_sequence_length: int = 131072
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    eos_token_id: int = 151643
    pad_token_id: int = 151643
    mask_token_id: int = 151666
    family: FamilyName = "dream"
