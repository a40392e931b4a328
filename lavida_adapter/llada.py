"""LLaDA, a masked-diffusion language model (arXiv 2502.09992), under the names of its published checkpoint.

docs/lavida.md, "Language model". It was trained from scratch as a diffusion model: the output at a masked position is
the prediction for that position. There are no biases, every query head has a key head of its own in the published
sizes, and rotary positions are applied in float32 whatever the weights are.

Two modules have the name `ff_out`: the down-projection of a block, and the head below the model. LoRA targets must name
them in full.
"""

from typing import ClassVar

from torch import nn

from lavida_adapter.language_model import Block, LanguageModel, Linear, RMSNorm, alias
from lavida_adapter.lm_config import LanguageModelConfig


class LladaBlock(Block):
    """A block without biases."""

    attention_norm = alias("attn_norm")
    query = alias("q_proj")
    key = alias("k_proj")
    value = alias("v_proj")
    attention_out = alias("attn_out")
    mlp_norm = alias("ff_norm")
    gate = alias("ff_proj")
    up = alias("up_proj")
    down = alias("ff_out")

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        d, kv = config.d_model, config.n_kv_heads * config.head_dim
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = Linear(d, d, config)
        self.k_proj = Linear(d, kv, config)
        self.v_proj = Linear(d, kv, config)
        self.attn_out = Linear(d, d, config)
        self.ff_proj = Linear(d, config.mlp_hidden_size, config)
        self.up_proj = Linear(d, config.mlp_hidden_size, config)
        self.ff_out = Linear(config.mlp_hidden_size, d, config)


class Llada(LanguageModel):
    """LLaDA; the output at a masked position predicts the token there."""

    shift: ClassVar[int] = 0
    embedding = alias("wte")
    layers = alias("blocks")
    final_norm = alias("ln_f")
    head = alias("ff_out")

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(LladaBlock(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = Linear(config.d_model, config.vocab_size, config)
