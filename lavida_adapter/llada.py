"""LLaDA, the masked-diffusion language model: attention backends, blocks, prefill over a prefix."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter.config import LladaConfig
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from lavida_adapter.config import LladaConfig
from lavida_adapter.kv_cache import PrefixCache, Slots

Backend = Literal["sdpa", "math", "flash"]

AttentionHook = Callable[[Tensor, Tensor, Tensor | None], None]
"""Looks at the rotated queries, the keys and the mask of a layer; called layer by layer."""


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention [B, H, Q, D]; `mask` (bool, broadcastable to [B, H, Q, K]) is True where a key may be seen.

    Raises:
        UserError: for "flash" with a mask, or an unknown backend.
    """
    groups = q_BHQD.shape[1] // k_BHKD.shape[1]
    if backend == "sdpa":
        grouped = {"enable_gqa": True} if groups > 1 else {}  # a branch, because a compiler knows no symbolic bool
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
                "the flash backend knows no mask: give prompts of equal length to a model with prefix_attention=full, "
                "or use the sdpa backend"
            )
        from flash_attn import flash_attn_func  # an optional extra: pip install shirg[gpu]

        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD)))
        return out.transpose(1, 2)
    raise UserError(f"attention backend {backend!r}: choose sdpa, math or flash")


def kernel_of(backend: Backend, device: torch.device, dtype: torch.dtype, heads: "LladaConfig") -> str:
    """The backend, and for "sdpa" the kernel that torch chooses for an answer against a prefix without padding."""
    if backend != "sdpa":
        return backend
    q, k = (torch.empty(1, heads.n_heads, n, heads.head_dim, device=device, dtype=dtype) for n in (32, 1056))
    return f"sdpa ({SDPBackend(torch._fused_sdp_choice(q, k, k)).name.lower()})"


def attention_weights(q_BHQD: Tensor, k_BHKD: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` weighs values by: [B, H, Q, K] in float32, for the few queries that somebody wants to look at."""
    k = k_BHKD.repeat_interleave(q_BHQD.shape[1] // k_BHKD.shape[1], 1)
    scores = q_BHQD.float() @ k.float().transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def attention_mask(mask_BL: Tensor | None, visual_BL: Tensor | None) -> Tensor | None:
    """What each position of a sequence may see, as a mask [B, 1, 1 or L, L]; None when that is everything.

    `mask_BL` is False in padding. With `visual_BL`, picture tokens see the picture alone, the others everything that is
    not padding; a padded position then sees itself, since a softmax over nothing has no value.
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
    """The block's outputs; with `recompute` and a gradient to come, nothing inside it is kept."""
    if recompute and torch.is_grad_enabled():
        # Random states are put back for the second run, so that dropout drops the same.
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
    """Cosine and signed sine [B, 1, L, Dh] in float32 for rotate-half rotary positions: what `rotate` takes."""
    return turn(rotary_phase(positions_BL, head_dim, theta))


def rotary_phase(positions_BL: Tensor, head_dim: int, theta: float) -> Tensor:
    """The angles themselves, as rounded to float32: far from 0 the rounding is as large as 1e-4."""
    j = torch.arange(0, head_dim, 2, device=positions_BL.device, dtype=torch.float32)
    angles = positions_BL[:, None, :, None].float() * (1.0 / theta ** (j / head_dim))
    return torch.cat([angles, angles], dim=-1)


def turn(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign that each half of a head meets its other half with: minus in the first."""
    first, second = angles.sin().chunk(2, dim=-1)
    return angles.cos(), torch.cat([-first, second], dim=-1)


def rotate(x_BHLD: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Applies rotary positions in float32 and casts back."""
    x = x_BHLD.float()
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed_sin)).to(x_BHLD.dtype)


class Block(nn.Module):
    """x += Attention(RMS(x)); x += SwiGLU(RMS(x))."""

    def __init__(self, config: LladaConfig) -> None:
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

    def mix(
        self,
        x: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        backend: Backend,
        watch: AttentionHook | None = None,
    ) -> Tensor:
        """The block's output, given its normed input `u` and the keys and values that its tokens may see."""
        q = self.queries(u, cos, sin)
        if watch is not None:
            watch(q, k, mask)
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
        watch: AttentionHook | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, and the keys and values of its input; `past` holds what else its tokens may see."""
        u = self.attn_norm(x)
        k, v = self.keys_values(u, cos, sin)
        seen = (k, v) if past is None else (torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2))
        return self.mix(x, u, *seen, cos, sin, mask, backend, watch), k, v


class Llada(nn.Module):
    """The transformer, from embeddings to logits. Attention is bidirectional.

    Two masks exist: padding is seen by nobody, and with `visual` (bool, True at picture tokens) picture tokens see the
    picture alone: image-first attention.
    """

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.backend: Backend = "sdpa"
        self.recompute = False
        """Whether blocks run again in the backward pass instead of keeping what they computed."""

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

        `mask_BL` is None when nothing is padded, `visual_BL` for one bidirectional block, `positions_BL` for 0..L-1.
        `hidden` collects the input of every block and the output.
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
        room: int = 0,
        watch: AttentionHook | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> PrefixCache:
        """Keys and values of the prefix, with `room` for so many answer tokens behind them; differentiable without.

        The last block only has to deliver its keys and values: nothing reads the prefix states behind it. `angles` are
        those of positions 0 to P-1, where they are at hand.
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
            if room or last:
                u = block.attn_norm(x)
                k, v = block.keys_values(u, cos, sin)
                if room:
                    slots = slots or Slots(k, [p] * len(self.layers), room)
                    k, v = slots.write(i, k, v)  # where attention reads them faster too
                if not last:
                    x = block.mix(x, u, k, v, cos, sin, mask, self.backend, watch)
                elif watch is not None:
                    watch(block.queries(u, cos, sin), k, mask)
            else:
                x, k, v = run_block(self.recompute, block, x, cos, sin, mask, self.backend, None, watch)
            keys.append(k)
            values.append(v)
        length_B = torch.full((b,), p, device=x.device) if mask_BP is None else mask_BP.sum(-1)
        return PrefixCache(tuple(keys), tuple(values), mask_BP, positions_BP, length_B, slots)

    def decode(self, embeds_BAD: Tensor, cache: PrefixCache, mask_BA: Tensor | None = None) -> Tensor:
        """States [B, A, D] of answer tokens that see the cached prefix and one another; `mask_BA` marks real ones.

        Differentiable, for training; at inference `lavida_adapter.engine` computes the same without concatenating.
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
        return self.ff_out(states)
