"""PrefixKV (Wang et al., arXiv 2412.03409) on a prefix cache: each layer keeps another number of rows.

Every layer keeps the same share of the attention that its rows receive in the prefill, not the same number of rows.
The numbers are profiled once on other prompts (`profile`) and then applied. "Prefix" in the paper's name is the first
part of the list of rows sorted by importance. docs/method.md, "Layer retention".

Shape letters: B batch, P prefix slots, K kept slots.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lavida_adapter.attention import AttentionHook, attention_weights
from lavida_adapter.cache_compression.compressor import CachePacker
from lavida_adapter.kv_cache import PrefixCache, RaggedPrefix, StoredPrefix, take_slots
from lavida_adapter.prefix import Prefix
from shirg import MissingFileError, UserError, send, stable_topk

FIRST, LAST = 4, 1
"""How many rows at both ends always stay, as in the paper's code."""


class MassReceived:
    """An `AttentionHook`: the attention each prefix row receives, averaged over heads, one float32 [B, P] a layer."""

    def __init__(self, mask_BP: Tensor, chunk: int = 128) -> None:
        self.masses: list[Tensor] = []
        self._mask_BP, self._chunk = mask_BP, chunk

    def __call__(self, q_BHPD: Tensor, k_BHPD: Tensor, mask: Tensor | None) -> None:
        total_BP = torch.zeros(self._mask_BP.shape, device=q_BHPD.device)
        for at in range(0, q_BHPD.shape[2], self._chunk):
            part = slice(at, at + self._chunk)
            rows = None if mask is None else mask if mask.shape[2] == 1 else mask[:, :, part]
            weights = attention_weights(q_BHPD[:, :, part], k_BHPD, rows).mean(1)
            total_BP += (weights * self._mask_BP[:, part, None]).sum(1)
        self.masses.append(total_BP)


class LayerRetention(CachePacker):
    """Keeps in every layer the rows that receive most attention; the profile says which share of the prompt."""

    def __init__(self, *, profile: str) -> None:
        """`profile`: a file written by `python -m experiments.bench.profile_cache`.

        Raises:
            MissingFileError: when there is no such file.
            UserError: when it is not a profile.
        """
        path = Path(profile)
        if not os.path.isfile(path):
            raise MissingFileError(
                f"cache.profile={profile!s:.200}: no such file; `python -m experiments.bench.profile_cache` writes one"
            )
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or "forget" not in content:
            raise UserError(f"cache.profile={profile} is not a profile: it has no list `forget`")
        self.forget: list[float] = [float(share) for share in content["forget"]]

    def hook(self, prefix: Prefix) -> AttentionHook | None:
        return MassReceived(prefix.mask_BP)

    def __call__(self, cache: PrefixCache, prefix: Prefix, seen: AttentionHook | None) -> StoredPrefix:
        assert isinstance(seen, MassReceived)
        if len(self.forget) != len(cache.keys):
            raise UserError(
                f"cache.profile was made for a model with {len(self.forget)} layers, this one has {len(cache.keys)}: "
                "profile this model"
            )
        pairs = zip(seen.masses, self.forget, strict=True)
        cut = [_cut(cache, i, mass_BP, share, prefix) for i, (mass_BP, share) in enumerate(pairs)]
        keys, values, masks, positions = (tuple(parts) for parts in zip(*cut, strict=True))
        return RaggedPrefix(keys, values, masks, positions, cache.next_position_B)


def _cut(
    cache: PrefixCache, layer: int, mass_BP: Tensor, share: float, prefix: Prefix
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, mask (None: all are real) and positions of one layer's kept rows."""
    counts = [n - forgotten(n, share) for n in prefix.n_tokens]
    slot_P = torch.arange(mass_BP.shape[1], device=mass_BP.device)
    length_B1 = prefix.mask_BP.sum(-1, keepdim=True)
    protected_BP = (slot_P < FIRST) | ((slot_P >= length_B1 - LAST) & (slot_P < length_B1))
    mass_BP = mass_BP.masked_fill(protected_BP, float("inf")).masked_fill(~prefix.mask_BP, float("-inf"))
    best_BK = stable_topk(mass_BP, max(counts))
    real_BK = torch.arange(max(counts), device=mass_BP.device) < send(torch.tensor(counts), mass_BP.device)[:, None]
    # Kept rows stay in order; the padding of shorter prompts goes behind them.
    slot_BK = best_BK.masked_fill(~real_BK, mass_BP.shape[1]).sort(-1).values
    real_BK = slot_BK < mass_BP.shape[1]
    slot_BK = slot_BK.masked_fill(~real_BK, 0)
    positions_BK = cache.positions_BP.gather(1, slot_BK)
    mask_BK = None if min(counts) == max(counts) else real_BK
    return take_slots(cache.keys[layer], slot_BK), take_slots(cache.values[layer], slot_BK), mask_BK, positions_BK


def forgotten(n: int, share: float) -> int:
    """How many of a prompt's `n` rows a layer drops; never a protected one."""
    return max(0, min(round(share * n), n - FIRST - LAST))


def profile(masses: Sequence[Sequence[Tensor]], forget: float) -> list[float]:
    """The share of rows that each layer drops, such that all keep the same share of attention and the mean is `forget`.

    `masses`: for each prompt and layer, the attention [n] that its rows receive. A binary search over the share of
    attention kept, as in the paper; then all shares are scaled by one factor to meet the budget.
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if _mean(_shares(masses, middle)) > forget:
            low = middle
        else:
            high = middle
    shares = _shares(masses, high)
    scale = forget / max(_mean(shares), 1e-9)
    return [min(share * scale, 1.0) for share in shares]


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)


def _shares(masses: Sequence[Sequence[Tensor]], keep_mass: float) -> list[float]:
    """The share of rows that each layer drops, averaged over prompts, if the kept rows have `keep_mass` attention."""
    layers = []
    for layer in range(len(masses[0])):
        shares = []
        for prompt in masses:
            mass = prompt[layer].double()
            curve = mass.sort(descending=True).values.cumsum(0) / mass.sum()
            kept = int((curve < keep_mass - 1e-12).sum()) + 1
            shares.append(max(0, len(mass) - kept - FIRST - LAST) / len(mass))
        layers.append(_mean(shares))
    return layers
