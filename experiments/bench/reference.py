"""A plain twin of generation: what the public reference does, as it does it (docs/lavida.md, "Quirks").

Keys are cached before rotation, and at every step the whole cache is concatenated and rotated again; the prompt's
logits are computed and thrown away; every answer slot gets logits, and their softmax is taken in float64. Weights are
those of our model, so that what is compared is the way of computing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.generate import DecodeConfig, tokens_per_step
from lavida_adapter.llada import Block, Llada, RMSNorm, attend, rotary_phase
from shirg import Role, VisionFeatures

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


Cell = tuple[int, int]
WEIGHT, SIGN = {"similarity": 0.65, "neighbor": 0.25}, -1


def naive_shirg980(features: VisionFeatures, sample: int, budget: int, scaffold: int = 8) -> tuple[Tensor, list[int]]:
    """The tokens [budget, D] of one picture and the source tokens among them, by the published weights.

    It reads the tiles alone, so it needs a picture whose tiles have enough valid tokens.
    """
    tokens_ND, layout = features.tokens_BND[sample].float(), features.layout
    relevance, valid = features.relevance_BN, features.valid_BN[sample].tolist()
    assert relevance is not None
    roles, cells = layout.role_N.tolist(), [(r, c) for r, c in layout.cell_N2.tolist()]
    tile_at = {cells[i]: i for i in range(layout.n_tokens) if roles[i] == Role.TILE and valid[i]}
    coarse_at = {cells[i]: i for i in range(layout.n_tokens) if roles[i] == Role.GLOBAL}
    unit_ND = torch.nn.functional.normalize(tokens_ND, dim=-1)
    distance = {cell: _distance(unit_ND, tile_at, cell) for cell in tile_at}
    r = _zscore({cell: float(relevance[sample, i]) for cell, i in tile_at.items()})
    d = _zscore(distance)
    score = {cell: WEIGHT["similarity"] * r[cell] + SIGN * WEIGHT["neighbor"] * d[cell] for cell in tile_at}
    best = sorted(tile_at, key=lambda cell: (-score[cell], cell))[: budget - scaffold**2]
    kept = [tile_at[cell] for cell in sorted(best)]
    windows = [
        _naive_window(tokens_ND, coarse_at, layout.side, scaffold, *divmod(w, scaffold)) for w in range(scaffold**2)
    ]
    return torch.cat([torch.stack(windows), tokens_ND[kept]]), kept


def _distance(unit_ND: Tensor, token_at: dict[Cell, int], cell: Cell) -> float:
    around = [
        (cell[0] + down, cell[1] + right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)
    ]
    neighbours = [token_at[place] for place in around if place in token_at]
    if not neighbours:
        return 0.0
    return float((unit_ND[neighbours] - unit_ND[token_at[cell]]).norm(dim=-1).mean())


def _zscore(values: dict[Cell, float]) -> dict[Cell, float]:
    mean = sum(values.values()) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / len(values))
    return {cell: max(-3.0, min(3.0, (value - mean) / (std + 1e-6))) for cell, value in values.items()}


def _naive_window(tokens_ND: Tensor, token_at: dict[Cell, int], side: int, size: int, row: int, col: int) -> Tensor:
    """Mean over a window of the global view; a cell on a boundary counts by the share that lies inside."""
    total, area = torch.zeros(tokens_ND.shape[-1]), 0.0
    for r in range(row * side // size, math.ceil((row + 1) * side / size)):
        for c in range(col * side // size, math.ceil((col + 1) * side / size)):
            high = min(r + 1, (row + 1) * side / size) - max(r, row * side / size)
            wide = min(c + 1, (col + 1) * side / size) - max(c, col * side / size)
            total, area = total + high * wide * tokens_ND[token_at[r, c]], area + high * wide
    return total / area
