"""LLaDA, the masked-diffusion language model: attention backends, blocks, prefill over a prefix.

docs/lavida.md, "Language model". Attention is bidirectional.

Shape letters: B batch, L positions, P prefix slots, A answer slots, Q queries, K keys, H heads, Dh head size, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from lavida_adapter.kv_cache import PrefixCache, Slots
from lavida_adapter.lm_config import LanguageModelConfig
from shirg import UserError

Backend = Literal["sdpa", "math", "flash"]

AttentionHook = Callable[[Tensor, Tensor, Tensor | None], None]
"""Called with the rotated queries, the keys and the mask of each layer, in the order of the layers."""


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention [B, H, Q, D]; `mask` (bool, broadcastable to [B, H, Q, K]) is True where a key may be seen.

    Raises:
        UserError: for "flash" with a mask, or an unknown backend.
    """
    groups = q_BHQD.shape[1] // k_BHKD.shape[1]
    if backend == "sdpa":
        grouped = {"enable_gqa": True} if groups > 1 else {}  # a branch: torch.compile cannot trace a symbolic bool
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask, **grouped)
    if backend == "math":
        k, v = k_BHKD.repeat_interleave(groups, 1), v_BHKD.repeat_interleave(groups, 1)
        scores = (q_BHQD @ k.transpose(-1, -2)).float() * q_BHQD.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    if backend == "flash":
        if mask is not None:
            raise UserError(
                "the flash backend takes no mask: give prompts of equal length to a model with prefix_attention=full, "
                "or use the sdpa backend"
            )
        from flash_attn import flash_attn_func  # an optional extra: pip install shirg[gpu]

        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD)))
        return out.transpose(1, 2)
    raise UserError(f"attention backend {backend!r}: choose sdpa, math or flash")


def kernel_of(backend: Backend, device: torch.device, dtype: torch.dtype, config: LanguageModelConfig) -> str:
    """The backend, and for "sdpa" the kernel that torch chooses for an answer against a prefix without padding."""
    if backend != "sdpa":
        return backend
    q, k = (torch.empty(1, config.n_heads, n, config.head_dim, device=device, dtype=dtype) for n in (32, 1056))
    return f"sdpa ({SDPBackend(torch._fused_sdp_choice(q, k, k)).name.lower()})"


def attention_weights(q_BHQD: Tensor, k_BHKD: Tensor, mask: Tensor | None) -> Tensor:
    """The attention weights of `attend` [B, H, Q, K] in float32; written out, so only for a few queries."""
    k = k_BHKD.repeat_interleave(q_BHQD.shape[1] // k_BHKD.shape[1], 1)
    scores = q_BHQD.float() @ k.float().transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def attention_mask(mask_BL: Tensor | None, visual_BL: Tensor | None) -> Tensor | None:
    """Which keys each position may see, as a mask [B, 1, 1 or L, L]; None when it may see all.

    `mask_BL` is False in padding. With `visual_BL` (True at picture tokens) picture tokens see picture tokens only, and
    the others see everything that is not padding. A padded position then sees itself, because a softmax over no key is
    NaN.
    """
    if visual_BL is None:
        return None if mask_BL is None else mask_BL[:, None, None, :]
    seen_BLL = ~visual_BL[:, :, None] | visual_BL[:, None, :]
    if mask_BL is not None:
        seen_BLL = seen_BLL & mask_BL[:, None, :]
    itself = torch.eye(visual_BL.shape[1], dtype=torch.bool, device=visual_BL.device)
    return (seen_BLL | itself)[:, None]


T = TypeVar("T")


def run_block(recompute: bool, block: Callable[..., T], *inputs: Any) -> T:
    """The block's outputs. With `recompute` and gradients enabled, the backward pass runs the block again."""
    if recompute and torch.is_grad_enabled():
        # The random state is restored for the second run, so that dropout drops the same elements.
        outputs: T = checkpoint(block, *inputs, use_reentrant=False)
        return outputs
    return block(*inputs)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, cast back before the weight is applied."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight


def rotary_angles(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [B, 1, L, Dh] in float32 for rotate-half rotary positions: the inputs of `rotate`."""
    return cos_signed_sin(rotary_phase(positions_BL, head_dim, theta))


def rotary_phase(positions_BL: Tensor, head_dim: int, theta: float) -> Tensor:
    """The angles [B, 1, L, Dh] in float32. Far from position 0 their rounding error is as large as 1e-4."""
    j = torch.arange(0, head_dim, 2, device=positions_BL.device, dtype=torch.float32)
    angles = positions_BL[:, None, :, None].float() * (1.0 / theta ** (j / head_dim))
    return torch.cat([angles, angles], dim=-1)


def cos_signed_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign that `rotate` needs: negative in the first half of a head."""
    first, second = angles.sin().chunk(2, dim=-1)
    return angles.cos(), torch.cat([-first, second], dim=-1)


def rotate(x_BHLD: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Applies rotary positions in float32 and casts back."""
    x = x_BHLD.float()
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed_sin)).to(x_BHLD.dtype)


class Block(nn.Module):
    """x += Attention(RMS(x)); x += SwiGLU(RMS(x))."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        d, kv = config.d_model, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d, bias=False)

    def keys_values(self, u_BLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, H, L, Dh] of normed states."""
        k, v = (proj(u_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return rotate(k, cos, sin), v

    def queries(self, u_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [B, H, L, Dh] of normed states."""
        return rotate(self.q_proj(u_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), cos, sin)

    def output(
        self,
        x: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        backend: Backend,
        hook: AttentionHook | None = None,
    ) -> Tensor:
        """The block's output, given its normed input `u` and the keys and values that its tokens may see."""
        q = self.queries(u, cos, sin)
        if hook is not None:
            hook(q, k, mask)
        x = x + self.attn_out(attend(q, k, v, mask, backend).transpose(1, 2).flatten(-2))
        u = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(u)) * self.up_proj(u))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        backend: Backend,
        past: tuple[Tensor, Tensor] | None = None,
        hook: AttentionHook | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, and the keys and values of its input. `past`: further keys and values [B, H, P, Dh]."""
        u = self.attn_norm(x)
        k, v = self.keys_values(u, cos, sin)
        seen = (k, v) if past is None else (torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2))
        return self.output(x, u, *seen, cos, sin, mask, backend, hook), k, v


class Llada(nn.Module):
    """The transformer, from embeddings to logits.

    There are two masks. Padding is never seen. With `visual` (bool, True at picture tokens) picture tokens see picture
    tokens only: image-first attention.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.backend: Backend = "sdpa"
        self.recompute = False
        """Gradient checkpointing: blocks run again in the backward pass instead of storing their activations."""

    @property
    def layers(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.blocks)

    def angles(self, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of the rotary positions."""
        return rotary_angles(positions_BL, self.config.head_dim, self.config.rope_theta)

    def forward(
        self,
        embeds_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        visual_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """States [B, L, D] after the final norm.

        `mask_BL`: None without padding. `visual_BL`: None for full bidirectional attention. `positions_BL`: None for
        0..L-1. `hidden` is filled with the input of every block and the output.
        """
        x = embeds_BLD
        if positions_BL is None:
            positions_BL = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = self.angles(positions_BL)
        mask = attention_mask(mask_BL, visual_BL)
        for block in self.layers:
            if hidden is not None:
                hidden.append(x)
            x, _, _ = run_block(self.recompute, block, x, cos, sin, mask, self.backend)
        x = self.ln_f(x)
        if hidden is not None:
            hidden.append(x)
        return x

    def prefill(
        self,
        embeds_BPD: Tensor,
        mask_BP: Tensor | None = None,
        visual_BP: Tensor | None = None,
        n_answer: int = 0,
        hook: AttentionHook | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> PrefixCache:
        """Keys and values of the prefix, stored with `n_answer` free slots behind them; differentiable if that is 0.

        The last block computes its keys and values only, because the prefix states behind it are never read.
        `angles`: those of positions 0 to P-1, if the caller has them already.
        """
        x = embeds_BPD
        b, p = x.shape[:2]
        positions_BP = torch.arange(p, device=x.device).expand(b, p)
        cos, sin = self.angles(positions_BP[:1]) if angles is None else angles
        mask = attention_mask(mask_BP, visual_BP)
        keys, values = [], []
        slots: Slots | None = None
        for i, block in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            if n_answer or last:
                u = block.attn_norm(x)
                k, v = block.keys_values(u, cos, sin)
                if n_answer:
                    slots = slots or Slots(k, [p] * len(self.layers), n_answer)
                    k, v = slots.write(i, k, v)  # attention reads them faster from there
                if not last:
                    x = block.output(x, u, k, v, cos, sin, mask, self.backend, hook)
                elif hook is not None:
                    hook(block.queries(u, cos, sin), k, mask)
            else:
                x, k, v = run_block(self.recompute, block, x, cos, sin, mask, self.backend, None, hook)
            keys.append(k)
            values.append(v)
        length_B = torch.full((b,), p, device=x.device) if mask_BP is None else mask_BP.sum(-1)
        return PrefixCache(tuple(keys), tuple(values), mask_BP, positions_BP, length_B, slots, visual_BP)

    def decode(self, embeds_BAD: Tensor, cache: PrefixCache, mask_BA: Tensor | None = None) -> Tensor:
        """States [B, A, D] of answer tokens, which see the cached prefix and each other; `mask_BA` is False in padding.

        Differentiable, for training. At inference `lavida_adapter.engine` computes the same without concatenating.
        """
        x = embeds_BAD
        b, a = x.shape[:2]
        cos, sin = self.angles(cache.next_position_B[:, None] + torch.arange(a, device=x.device))
        mask = None
        if cache.mask_BP is not None or mask_BA is not None:
            parts = (cache.mask_BP, mask_BA)
            sizes = (cache.positions_BP.shape[1], a)
            ones = (torch.ones(b, n, dtype=torch.bool, device=x.device) for n in sizes)
            seen_BK = torch.cat([o if m is None else m for m, o in zip(parts, ones, strict=True)], dim=1)
            mask = attention_mask(seen_BK, None)
        for block, past in zip(self.layers, zip(cache.keys, cache.values, strict=True), strict=True):
            x, _, _ = run_block(self.recompute, block, x, cos, sin, mask, self.backend, past)
        return self.ln_f(x)

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., W] over the vocabulary."""
        return self.ff_out(states)
