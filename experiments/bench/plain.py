"""A plain twin of generation: what the public reference does, as it does it (docs/lavida.md, "Quirks").

Keys are cached before rotation, and at every step the whole cache is concatenated and rotated again; the prompt's
logits are computed and thrown away; every answer slot gets logits, and their softmax is taken in float64. Weights are
those of our model, so that what is compared is the way of computing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.attention import attend
from lavida_adapter.denoise import DecodeConfig
from lavida_adapter.llada import Block, Llada, RMSNorm, rotary_phase
from lavida_adapter.schedule import tokens_per_step

Past = list[tuple[Tensor, Tensor]]
"""For each layer, keys before rotation and values [B, H, P, Dh]."""


Angles = tuple[Tensor, Tensor]


def plain_forward(lm: Llada, x_BLD: Tensor, past: Past | None, angles: Angles) -> tuple[Tensor, Past]:
    """Logits [B, L, W] of all that is given, and the keys and values of it and of what came before.

    `angles` are those of every position that there will be; the reference keeps them too.
    """
    present: Past = []
    for i, block in enumerate(lm.layers):
        x_BLD, kept = _block(block, x_BLD, None if past is None else past[i], angles)
        present.append(kept)
    return lm.ff_out(_norm(lm.ln_f, x_BLD)), present


def _block(
    block: Block, x_BLD: Tensor, past: tuple[Tensor, Tensor] | None, angles: Angles
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    u = _norm(block.attn_norm, x_BLD)
    q, k, v = (
        proj(u).unflatten(-1, (-1, block.head_dim)).transpose(1, 2)
        for proj in (block.q_proj, block.k_proj, block.v_proj)
    )
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    n = q.shape[2]
    cos, sin = (t[:, :, : k.shape[2]] for t in angles)
    out = attend(_rotate(q, cos[:, :, -n:], sin[:, :, -n:]), _rotate(k, cos, sin), v, None)
    x_BLD = x_BLD + block.attn_out(out.transpose(1, 2).flatten(-2))
    u = _norm(block.ff_norm, x_BLD)
    return x_BLD + block.ff_out(F.silu(block.ff_proj(u)) * block.up_proj(u)), (k, v)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def angles_of(lm: Llada, n: int) -> Angles:
    positions_1L = torch.arange(n, device=lm.wte.weight.device)[None]
    phase = rotary_phase(positions_1L, lm.config.head_dim, lm.config.rope_theta)
    return phase.cos(), phase.sin()


def plain_step(lm: Llada, ids_BA: Tensor, past: Past, angles: Angles, mask_id: int, ks: list[int]) -> Tensor:
    """One denoising step that commits `ks[row]` tokens; like ours, it never chooses the mask token."""
    logits, _ = plain_forward(lm, lm.wte(ids_BA), past, angles)
    logits[..., mask_id] = float("-inf")
    token_BA = logits.argmax(-1)
    p = logits.to(torch.float64).softmax(-1)
    confidence_BA = p.gather(-1, token_BA[..., None])[..., 0].masked_fill(ids_BA != mask_id, float("-inf"))
    commit_BA = torch.zeros_like(ids_BA, dtype=torch.bool)
    for row, k in enumerate(ks):
        commit_BA[row, confidence_BA[row].topk(k).indices] = True
    return torch.where(commit_BA, token_BA, ids_BA)


@torch.inference_mode()
def plain_generate(lm: Llada, embeds_BPD: Tensor, config: DecodeConfig, mask_id: int) -> Tensor:
    """Answers [B, A] in one block, greedy, the surest first. Prompts are of one length: the reference knows no mask."""
    angles = angles_of(lm, embeds_BPD.shape[1] + config.max_new_tokens)
    _, past = plain_forward(lm, embeds_BPD, None, angles)
    ids_BA = torch.full((len(embeds_BPD), config.max_new_tokens), mask_id, device=embeds_BPD.device)
    for k in tokens_per_step(config.max_new_tokens, config.steps_per_block, config.schedule, config.shift):
        ids_BA = plain_step(lm, ids_BA, past, angles, mask_id, [k] * len(ids_BA))
    return ids_BA
