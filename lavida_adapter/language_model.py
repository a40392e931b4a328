"""A masked-diffusion language model: norms, rotary positions, blocks, prefill over a prefix.

docs/lavida.md, "Language model". Attention is bidirectional. What is the same in all families is here; a family adds
the names of its modules (`lavida_adapter.llada`, `lavida_adapter.dream`).

Shape letters: B batch, L positions, P prefix slots, A answer slots, Q queries, K keys, H heads, Dh head size, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavida_adapter.attention import AttentionHook, Backend, attend, attention_mask
from lavida_adapter.joined_prompts import JoinedPrompts, attend_joined
from lavida_adapter.kv_cache import PrefixCache, Slots
from lavida_adapter.lm_config import LanguageModelConfig

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
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight


PART = 2**20
"""How many random numbers are drawn at once."""


@torch.no_grad()
def draw_normal(weight: Tensor, std: float) -> None:
    """Fills `weight` with normal numbers of mean 0, drawn in float32 whatever its dtype.

    On a CPU torch draws bfloat16 numbers at half the speed: at the published size that is half a minute.
    """
    numbers = torch.empty(min(PART, weight.numel()), dtype=torch.float32, device=weight.device)
    for part in weight.view(-1).split(PART):
        part.copy_(numbers[: len(part)].normal_(std=std))


class Linear(nn.Linear):
    """A linear layer whose fresh weights are drawn once, with the standard deviation of the config."""

    def __init__(self, n_in: int, n_out: int, config: LanguageModelConfig, *, bias: bool = False) -> None:
        self.init_std = config.init_std
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        if self.init_std is None:
            super().reset_parameters()
        else:
            draw_normal(self.weight, self.init_std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


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
    """Applies rotary positions in the dtype of the angles and casts back."""
    x = x_BHLD.to(cos.dtype)
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed_sin)).to(x_BHLD.dtype)


def pick(x_BLD: Tensor, at_BM: Tensor) -> Tensor:
    """The rows [B, M, D] at the given positions."""
    return x_BLD.gather(1, at_BM[..., None].expand(-1, -1, x_BLD.shape[-1]))


def alias(*path: str) -> Any:
    """A part of a module under a second name; modules keep the names of the published checkpoint."""

    def find(self: Any) -> Any:
        for name in path:
            self = getattr(self, name)
        return self

    return property(find)


class Block(nn.Module):
    """x += Attention(RMS(x)); x += SwiGLU(RMS(x)). A family says which of its modules plays which part."""

    attention_norm: RMSNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_out: nn.Linear
    mlp_norm: RMSNorm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim

    def keys_values(self, u_BLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, H, L, Dh] of normed states."""
        k, v = (proj(u_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.key, self.value))
        return rotate(k, cos, sin), v

    def queries(self, u_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [B, H, L, Dh] of normed states."""
        return rotate(self.query(u_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), cos, sin)

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
        return self.finish(x, attend(q, k, v, mask, backend).transpose(1, 2).flatten(-2))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output [B, L, D] from its input and the heads [B, L, H * Dh] that attention returned."""
        x = x + self.attention_out(attended)
        u = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(u)) * self.up(u))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values [B, H, L, Dh] of states before their norm."""
        u = self.attention_norm(x)
        return self.queries(u, cos, sin), *self.keys_values(u, cos, sin)

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
        u = self.attention_norm(x)
        k, v = self.keys_values(u, cos, sin)
        seen = (k, v) if past is None else (torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2))
        return self.output(x, u, *seen, cos, sin, mask, backend, hook), k, v


class StepLayer(Protocol):
    """What inference needs of a block, before and after attention; see `Block`."""

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def finish(self, x: Tensor, attended: Tensor) -> Tensor: ...


class LanguageModel(nn.Module):
    """A masked-diffusion transformer, from embeddings to logits; LLaDA and Dream say where their modules differ.

    There are two masks. Padding is never seen. With `visual` (bool, True at picture tokens) picture tokens see picture
    tokens only: image-first attention.
    """

    shift: ClassVar[int]
    """The output at position n predicts the token at position n + shift."""
    embedding: nn.Embedding
    layers: Sequence[Block]
    final_norm: RMSNorm
    head: nn.Linear

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: Backend = "sdpa"
        self.recompute = False
        """Gradient checkpointing: blocks run again in the backward pass instead of storing their activations."""

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
        x = self.final_norm(x)
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
        slots: Slots | None = None,
        layers: Sequence[StepLayer] | None = None,
    ) -> PrefixCache:
        """Keys and values of the prefix, stored with `n_answer` free slots behind them, or in the given `slots`.

        Differentiable where they are stored in neither way.

        The last block computes its keys and values only, because the prefix states behind it are never read. With a
        shift, the state of each prompt's last token predicts the answer's first one, and is kept in `last_BD`.
        `angles`: those of positions 0 to P-1, if the caller has them already. `layers`: what runs in place of the
        blocks when keys and values are stored.
        """
        x = embeds_BPD
        b, p = x.shape[:2]
        positions_BP = torch.arange(p, device=x.device).expand(b, p)
        cos, sin = self.angles(positions_BP[:1]) if angles is None else angles
        mask = attention_mask(mask_BP, visual_BP)
        length_B = torch.full((b,), p, device=x.device) if mask_BP is None else mask_BP.sum(-1)
        keys, values = [], []
        stores = slots is not None or n_answer > 0
        last_BD: Tensor | None = None
        for i, block in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            if stores and not last:
                layer = block if layers is None else layers[i]
                q, k, v = layer.project(x, cos, sin)
                slots = slots or Slots.blank(k, [p] * len(self.layers), n_answer)
                k, v = slots.write(i, k, v)  # attention reads them faster from there
                if hook is not None:
                    hook(q, k, mask)
                x = layer.finish(x, attend(q, k, v, mask, self.backend).transpose(1, 2).flatten(-2))
            elif last:
                u = block.attention_norm(x)
                k, v = block.keys_values(u, cos, sin)
                if stores:
                    slots = slots or Slots.blank(k, [p] * len(self.layers), n_answer)
                    k, v = slots.write(i, k, v)
                if hook is not None:
                    hook(block.queries(u, cos, sin), k, mask)
                if last and self.shift:
                    at_B1 = length_B[:, None] - 1
                    cos_1, sin_1 = (pick(t[:, 0].expand(b, -1, -1), at_B1)[:, None] for t in (cos, sin))
                    # The last token is text, which sees all that is not padding.
                    seen = attention_mask(mask_BP, None)
                    state_B1D = block.output(pick(x, at_B1), pick(u, at_B1), k, v, cos_1, sin_1, seen, self.backend)
                    last_BD = self.final_norm(state_B1D)[:, 0]
            else:
                x, k, v = run_block(self.recompute, block, x, cos, sin, mask, self.backend, None, hook)
            keys.append(k)
            values.append(v)
        return PrefixCache(tuple(keys), tuple(values), mask_BP, positions_BP, length_B, slots, visual_BP, last_BD)

    def prefill_joined(
        self,
        embeds_BPD: Tensor,
        mask_BP: Tensor,
        lengths: Sequence[int],
        n_answer: int = 0,
        slots: Slots | None = None,
        layers: Sequence[StepLayer] | None = None,
    ) -> PrefixCache:
        """`prefill` of unequal prompts under full attention without computing their padding; for inference.

        `lengths`: tokens of each prompt, which are its first ones. Keys and values of padding are zeros, or what the
        given `slots` held.
        """
        b, p = embeds_BPD.shape[:2]
        prompts = JoinedPrompts.of(lengths, embeds_BPD.device)
        x = prompts.join(embeds_BPD)
        cos, sin = self.angles(prompts.place_T[None])
        shape = (b, self.config.n_kv_heads, p + n_answer, self.config.head_dim)
        slots = slots or Slots.zeros(len(self.layers), shape, n_answer, like=x)
        stored = [(keys[:, :, :p], values[:, :, :p]) for keys, values in zip(slots.keys, slots.values, strict=True)]
        for layer, place in zip((layers or self.layers)[:-1], stored, strict=False):
            q, k, v = layer.project(x, cos, sin)
            prompts.store((k, v), place)
            x = layer.finish(x, attend_joined(q, k, v, prompts, self.backend).flatten(-2))
        block, last_BD = self.layers[-1], None
        u = block.attention_norm(x)
        k, v = block.keys_values(u, cos, sin)
        prompts.store((k, v), stored[-1])
        if self.shift:
            at_B = prompts.last_B
            q = block.queries(u[:, at_B], cos[:, :, at_B], sin[:, :, at_B])
            heads = attend_joined(q, k, v, prompts, self.backend, one_each=True)
            last_BD = self.final_norm(block.finish(x[:, at_B], heads.flatten(-2)))[0]
        positions_BP = torch.arange(p, device=x.device).expand(b, p)
        length_B = mask_BP.sum(-1)
        keys, values = zip(*stored, strict=True)
        return PrefixCache(keys, values, mask_BP, positions_BP, length_B, slots, None, last_BD)

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
        return self.final_norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., W] over the vocabulary."""
        return self.head(states)

    def source_rows(self, want_BM: Tensor | None, ids_BA: Tensor) -> Tensor | None:
        """The rows [B, M] of an answer's output that predict the wanted slots; None stands for all slots in order.

        Slot 0 is predicted by the prompt, which a step over a cache does not see: its own row stands in, as in Dream's
        published sampler. Generation takes the token of slot 0 from the prefill.
        """
        if not self.shift:
            return want_BM
        if want_BM is None:
            want_BM = torch.arange(ids_BA.shape[1], device=ids_BA.device).expand(len(ids_BA), -1)
        return (want_BM - self.shift).clamp_min(0)
