"""Plain implementations that the benches time ours against: LaViDa's decoding, and SHIRG-980 as loops over cells.

Decoding does what the public code of each language model does (docs/lavida.md, "Quirks" and "Dream's decoding"). Both
concatenate the cache and the answer's keys at every step, compute the prompt's logits whether they are used or not, and
give every answer slot logits at every step, also where nothing is committed. LLaDA's code caches keys before their
rotation, rotates all of them at every step and takes the softmax in float64; Dream's caches them rotated and ranks by
the softmax over the 50 likeliest tokens. The weights are those of our model, so that only the computation differs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.attention import attend
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.families import FAMILIES
from lavida_adapter.language_model import Block, LanguageModel, RMSNorm, rotary_phase
from lavida_adapter.lm_config import FamilyName
from lavida_adapter.schedules import tokens_per_step
from shirg import Role, VisionFeatures

Past = list[tuple[Tensor, Tensor]]
"""For each layer, keys and values [B, H, P, Dh]; keys rotated or not, as the public code caches them."""

Angles = tuple[Tensor, Tensor]


def wide_softmax(logits_BAW: Tensor) -> Tensor:
    return logits_BAW.to(torch.float64).softmax(-1)


def likeliest_softmax(logits_BAW: Tensor, k: int = 50) -> Tensor:
    """The softmax over the `k` likeliest tokens, in the type of the logits."""
    least_BA1 = logits_BAW.topk(min(k, logits_BAW.shape[-1])).values[..., -1:]
    return logits_BAW.masked_fill(logits_BAW < least_BA1, torch.finfo(logits_BAW.dtype).min).softmax(-1)


@dataclass(frozen=True)
class PublicCode:
    """What the public code of a language model does in its own way."""

    caches_rotated: bool
    confidence: Callable[[Tensor], Tensor]
    """Logits [B, A, W] -> the probabilities that slots are ranked by."""


PUBLIC: Mapping[FamilyName, PublicCode] = {
    "llada": PublicCode(False, wide_softmax),
    "dream": PublicCode(True, likeliest_softmax),
}


def plain_forward(lm: LanguageModel, x_BLD: Tensor, past: Past | None, angles: Angles) -> tuple[Tensor, Past]:
    """Logits [B, L, W] of the inputs, and the keys and values of the past and the inputs.

    `angles` are those of every position, up to the end of the answer; the reference keeps them too.
    """
    present: Past = []
    rotated = PUBLIC[lm.config.family].caches_rotated
    for i, block in enumerate(lm.layers):
        x_BLD, kept = _block(block, x_BLD, None if past is None else past[i], angles, rotated)
        present.append(kept)
    return lm.head(_norm(lm.final_norm, x_BLD)), present


def _block(
    block: Block, x_BLD: Tensor, past: tuple[Tensor, Tensor] | None, angles: Angles, rotated: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    u = _norm(block.attention_norm, x_BLD)
    q, k, v = (
        proj(u).unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for proj in (block.query, block.key, block.value)
    )
    n_past, n = 0 if past is None else past[0].shape[2], q.shape[2]
    own_cos, own_sin = (t[:, :, n_past : n_past + n] for t in angles)
    if rotated:
        k = _rotate(k, own_cos, own_sin)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    keys = k if rotated else _rotate(k, *(t[:, :, : n_past + n] for t in angles))
    out = attend(_rotate(q, own_cos, own_sin), keys, v, None)
    x_BLD = x_BLD + block.attention_out(out.transpose(1, 2).flatten(-2))
    u = _norm(block.mlp_norm, x_BLD)
    return x_BLD + block.down(F.silu(block.gate(u)) * block.up(u)), (k, v)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def angles_of(lm: LanguageModel, n: int) -> Angles:
    """Cosines and sines of the rotary phases of positions 0 to n - 1, in the type in which the model rotates."""
    positions_1L = torch.arange(n, device=lm.embedding.weight.device)[None]
    phase, dtype = (
        rotary_phase(positions_1L, lm.config.head_dim, lm.config.rope_theta),
        lm.angles(positions_1L)[0].dtype,
    )
    return phase.cos().to(dtype), phase.sin().to(dtype)


def plain_counts(lm: LanguageModel, config: DecodeConfig) -> list[int]:
    """How many tokens each step commits. A Dream's first token comes from the prompt."""
    schedule = FAMILIES[lm.config.family].sampler.schedule if config.schedule == "none" else config.schedule
    return tokens_per_step(config.max_new_tokens - lm.shift, config.steps_per_block, schedule, config.shift, config.eps)


def plain_step(lm: LanguageModel, ids_BA: Tensor, past: Past, angles: Angles, mask_id: int, ks: list[int]) -> Tensor:
    """One denoising step that commits `ks[row]` tokens; like ours, it never chooses the mask token."""
    logits, _ = plain_forward(lm, lm.embedding(ids_BA), past, angles)
    if lm.shift:
        logits = torch.cat([logits[:, : lm.shift], logits[:, : -lm.shift]], dim=1)
    logits[..., mask_id] = float("-inf")
    token_BA = logits.argmax(-1)
    p = PUBLIC[lm.config.family].confidence(logits)
    confidence_BA = p.gather(-1, token_BA[..., None])[..., 0].masked_fill(ids_BA != mask_id, float("-inf"))
    commit_BA = torch.zeros_like(ids_BA, dtype=torch.bool)
    for row, k in enumerate(ks):
        commit_BA[row, confidence_BA[row].topk(k).indices] = True
    return torch.where(commit_BA, token_BA, ids_BA)


@torch.inference_mode()
def plain_generate(lm: LanguageModel, embeds_BPD: Tensor, config: DecodeConfig, mask_id: int) -> Tensor:
    """Answers [B, A] in one block, greedy, the most confident first. Prompts have one length: there is no mask.

    A step that commits nothing runs like the others: our own loop leaves it out.
    """
    angles = angles_of(lm, embeds_BPD.shape[1] + config.max_new_tokens)
    logits_BPW, past = plain_forward(lm, embeds_BPD, None, angles)
    ids_BA = torch.full((len(embeds_BPD), config.max_new_tokens), mask_id, device=embeds_BPD.device)
    if lm.shift:
        logits_BPW[:, -1, mask_id] = float("-inf")
        ids_BA[:, 0] = logits_BPW[:, -1].argmax(-1)
    for k in plain_counts(lm, config):
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
