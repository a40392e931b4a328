"""LLaDA, a masked-diffusion language model (arXiv 2502.09992), under the names of its published checkpoint."""

from typing import ClassVar

from torch import nn

from lavida_adapter.language_model import Block, LanguageModel, RMSNorm, alias
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
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d, bias=False)


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
        self.ff_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
