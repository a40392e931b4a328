"""Plain implementations that the benches time ours against: LaViDa's decoding, and SHIRG-980 as loops over cells.

Decoding does what the public reference does (docs/lavida.md, "Quirks"): keys are cached before rotation, and at every
step the whole cache is concatenated and rotated again; the prompt's logits are computed and not used; every answer slot
gets logits, and their softmax is taken in float64. The weights are those of our model, so that only the computation
differs.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.attention import attend
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.language_model import Block, LanguageModel, RMSNorm, rotary_phase
from lavida_adapter.schedules import tokens_per_step
from shirg import Role, VisionFeatures

Past = list[tuple[Tensor, Tensor]]
"""For each layer, keys before rotation and values [B, H, P, Dh]."""

Angles = tuple[Tensor, Tensor]


def plain_forward(lm: LanguageModel, x_BLD: Tensor, past: Past | None, angles: Angles) -> tuple[Tensor, Past]:
    """Logits [B, L, W] of the inputs, and the keys and values of the past and the inputs.

    `angles` are those of every position, up to the end of the answer; the reference keeps them too.
    """
    present: Past = []
    for i, block in enumerate(lm.layers):
        x_BLD, kept = _block(block, x_BLD, None if past is None else past[i], angles)
        present.append(kept)
    return lm.head(_norm(lm.final_norm, x_BLD)), present


def _block(
    block: Block, x_BLD: Tensor, past: tuple[Tensor, Tensor] | None, angles: Angles
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    u = _norm(block.attention_norm, x_BLD)
    q, k, v = (
        proj(u).unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for proj in (block.query, block.key, block.value)
    )
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    n = q.shape[2]
    cos, sin = (t[:, :, : k.shape[2]] for t in angles)
    out = attend(_rotate(q, cos[:, :, -n:], sin[:, :, -n:]), _rotate(k, cos, sin), v, None)
    x_BLD = x_BLD + block.attention_out(out.transpose(1, 2).flatten(-2))
    u = _norm(block.mlp_norm, x_BLD)
    return x_BLD + block.down(F.silu(block.gate(u)) * block.up(u)), (k, v)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def angles_of(lm: LanguageModel, n: int) -> Angles:
    """Cosines and sines of the rotary phases of positions 0 to n - 1."""
    positions_1L = torch.arange(n, device=lm.embedding.weight.device)[None]
    phase = rotary_phase(positions_1L, lm.config.head_dim, lm.config.rope_theta)
    return phase.cos(), phase.sin()


def plain_step(lm: LanguageModel, ids_BA: Tensor, past: Past, angles: Angles, mask_id: int, ks: list[int]) -> Tensor:
    """One denoising step that commits `ks[row]` tokens; like ours, it never chooses the mask token."""
    logits, _ = plain_forward(lm, lm.embedding(ids_BA), past, angles)
    logits[..., mask_id] = float("-inf")
    token_BA = logits.argmax(-1)
    p = logits.to(torch.float64).softmax(-1)
    confidence_BA = p.gather(-1, token_BA[..., None])[..., 0].masked_fill(ids_BA != mask_id, float("-inf"))
    commit_BA = torch.zeros_like(ids_BA, dtype=torch.bool)
    for row, k in enumerate(ks):
        commit_BA[row, confidence_BA[row].topk(k).indices] = True
    return torch.where(commit_BA, token_BA, ids_BA)


@torch.inference_mode()
def plain_generate(lm: LanguageModel, embeds_BPD: Tensor, config: DecodeConfig, mask_id: int) -> Tensor:
    """Answers [B, A] in one block, greedy, the most confident first. Prompts have one length: there is no mask."""
    angles = angles_of(lm, embeds_BPD.shape[1] + config.max_new_tokens)
    _, past = plain_forward(lm, embeds_BPD, None, angles)
    ids_BA = torch.full((len(embeds_BPD), config.max_new_tokens), mask_id, device=embeds_BPD.device)
    for k in tokens_per_step(config.max_new_tokens, config.steps_per_block, config.schedule, config.shift):
        ids_BA = plain_step(lm, ids_BA, past, angles, mask_id, [k] * len(ids_BA))
    return ids_BA


Cell = tuple[int, int]
Key = TypeVar("Key")
SIMILARITY, NEIGHBOR = 0.65, 0.25
"""The published weights."""


def naive_shirg980(
    features: VisionFeatures, sample: int, budget: int, scaffold: int = 8, sign: int = -1
) -> tuple[Tensor, list[int]]:
    """The tokens [budget, D] of one picture, and which source tokens are kept, by the published weights.

    Tokens of the global view are kept only where the tiles have too few valid tokens.
    """
    tokens_ND, layout, k = features.tokens_BND[sample].float(), features.layout, budget - scaffold**2
    relevance = features.relevance_BN
    assert relevance is not None
    unit_ND = F.normalize(tokens_ND, dim=-1)
    tile_at, coarse_at = (valid_tokens(features, sample, role) for role in (Role.TILE, Role.GLOBAL))
    kept: list[int] = []
    for token_at in (tile_at, coarse_at):
        if token_at and len(kept) < k:
            r = zscore({cell: float(relevance[sample, i]) for cell, i in token_at.items()})
            d = zscore({cell: neighbour_distance(unit_ND, token_at, cell) for cell in token_at})
            score = {cell: SIMILARITY * r[cell] + sign * NEIGHBOR * d[cell] for cell in token_at}
            best = sorted(score.items(), key=lambda item: (-item[1], item[0]))
            kept += [token_at[cell] for cell, _ in best[: k - len(kept)]]
    rank = layout.rank_N.tolist()
    kept.sort(key=lambda i: int(rank[i]))
    side = (layout.side, layout.side)
    windows = [window_mean(tokens_ND, coarse_at, side, scaffold, w)[0] for w in range(scaffold**2)]
    return torch.cat([torch.stack(windows), tokens_ND[kept]]), kept


def valid_tokens(features: VisionFeatures, sample: int, role: Role) -> dict[Cell, int]:
    """The valid token at each cell of the canvas (TILE) or of the global view (GLOBAL)."""
    roles, valid = features.layout.role_N.tolist(), features.valid_BN[sample].tolist()
    cells = features.layout.cell_N2.tolist()
    return {(r, c): i for i, (r, c) in enumerate(cells) if roles[i] == role and valid[i]}


def neighbours(token_at: Mapping[Cell, int], cell: Cell) -> list[int]:
    """The tokens on the 8 cells around a cell."""
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    around = [(cell[0] + down, cell[1] + right) for down, right in steps]
    return [token_at[other] for other in around if other in token_at]


def neighbour_distance(unit_ND: Tensor, token_at: Mapping[Cell, int], cell: Cell) -> float:
    """Mean distance of the token at a cell to its neighbours; 0 without any."""
    around = neighbours(token_at, cell)
    return float((unit_ND[around] - unit_ND[token_at[cell]]).norm(dim=-1).mean()) if around else 0.0


def zscore(values: Mapping[Key, float]) -> dict[Key, float]:
    """The values with mean 0 and standard deviation 1, clamped to +-3."""
    mean = sum(values.values()) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / len(values))
    return {key: max(-3.0, min(3.0, (value - mean) / (std + 1e-6))) for key, value in values.items()}


def window_mean(
    tokens_ND: Tensor, token_at: Mapping[Cell, int], shape: tuple[int, int], size: int, window: int
) -> tuple[Tensor, float]:
    """Mean and area, in cells, of the tokens in one of size x size windows over a grid of `shape` cells.

    A cell on a boundary counts by the share of it that lies inside; a cell without a token does not count.
    """
    (rows, cols), (row, col) = shape, divmod(window, size)
    total, area = tokens_ND.new_zeros(tokens_ND.shape[-1]), 0.0
    for r in range(row * rows // size, math.ceil((row + 1) * rows / size)):
        for c in range(col * cols // size, math.ceil((col + 1) * cols / size)):
            if (r, c) in token_at:
                height = min(r + 1, (row + 1) * rows / size) - max(r, row * rows / size)
                width = min(c + 1, (col + 1) * cols / size) - max(c, col * cols / size)
                total = total + height * width * tokens_ND[token_at[r, c]]
                area += height * width
    return total / max(area, 1e-9), area
