"""Dream, a masked-diffusion language model made from Qwen2.5 (arXiv 2508.15487), under its published names.

docs/lavida.md, "Dream". It keeps Qwen2.5's habit of predicting the next token: the output at position n belongs to the
token at n + 1. `lm_head` is a part of this module here, and beside it in the published checkpoint.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

from torch import Tensor, nn

from lavida_adapter.language_model import Block, LanguageModel, Linear, RMSNorm, alias
from lavida_adapter.lm_config import LanguageModelConfig


class _Attention(nn.Module):
    """The projections of grouped-query attention; queries, keys and values have biases."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        d, kv = config.d_model, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(d, d, config, bias=True)
        self.k_proj = Linear(d, kv, config, bias=True)
        self.v_proj = Linear(d, kv, config, bias=True)
        self.o_proj = Linear(d, d, config)


class _Mlp(nn.Module):
    """The projections of the SwiGLU."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.mlp_hidden_size, config)
        self.up_proj = Linear(config.d_model, config.mlp_hidden_size, config)
        self.down_proj = Linear(config.mlp_hidden_size, config.d_model, config)


class DreamBlock(Block):
    """A block of Qwen2.5, run without a causal mask."""

    attention_norm = alias("input_layernorm")
    query = alias("self_attn", "q_proj")
    key = alias("self_attn", "k_proj")
    value = alias("self_attn", "v_proj")
    attention_out = alias("self_attn", "o_proj")
    mlp_norm = alias("post_attention_layernorm")
    gate = alias("mlp", "gate_proj")
    up = alias("mlp", "up_proj")
    down = alias("mlp", "down_proj")

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = _Mlp(config)


class Dream(LanguageModel):
    """Dream; the output at a position predicts the next token, so an answer's first token comes from the prompt."""

    shift: ClassVar[int] = 1
    embedding = alias("embed_tokens")
    final_norm = alias("norm")
    head = alias("lm_head")

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        # As published: the padding token's embedding, which is also that of end-of-text, is never trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        blocks = nn.ModuleList(DreamBlock(config) for _ in range(config.n_layers))
        self.layers = cast("Sequence[Block]", blocks)
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size, config)

    def angles(self, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype of the activations, in which Dream rotates; LLaDA rotates in float32."""
        cos, sin = super().angles(positions_BL)
        dtype = self.embed_tokens.weight.dtype
        return cos.to(dtype), sin.to(dtype)
