"""Cache methods on the attention of golden cases, each through its own class, against what the official code kept.

The cases hold queries and keys, or attention weights. A weight w comes out of a layer whose query is its logarithm and
whose keys are the unit vectors. The language model, of which these methods read one layer, is a stand-in.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lavida_adapter import FastV, LayerRetention, Prefix, RedVTP
from lavida_adapter.cache_compression.compressor import AttentionMean, FirstStep
from lavida_adapter.cache_compression.layer_retention import MassReceived, RaggedPrefix, profile
from lavida_adapter.kv_cache import PrefixCache
from tests.parity.rivals.agreement import Check, RivalCase

TOLERANCE = 1e-6
"""Of attention weights and their means in float32."""


def prompt(length: int, first_visual: int, n_visual: int) -> Prefix:
    slot_P = torch.arange(length)
    visual_BP = ((slot_P >= first_visual) & (slot_P < first_visual + n_visual))[None]
    return Prefix(torch.zeros(1, length, 1), torch.ones(1, length, dtype=torch.bool), visual_BP)


def cache_of(*keys_HPD: Tensor) -> PrefixCache:
    keys = tuple(k[None] for k in keys_HPD)
    length = keys[0].shape[2]
    return PrefixCache(keys, keys, None, torch.arange(length)[None], torch.tensor([length]))


def seen_by(hook: Any, weights_HQK: Tensor) -> None:
    """Gives an attention hook a query and keys with these weights."""
    h, _, k = weights_HQK.shape
    query_HQK = weights_HQK.clamp_min(torch.finfo(torch.float32).tiny).log() * k**0.5
    hook(query_HQK[None], torch.eye(k).expand(1, h, k, k), None)


def fastv(case: RivalCase) -> None:
    query_HD, keys_HPD, weights_HP = case["query"], case["keys"], case["attention"]
    prefix = prompt(keys_HPD.shape[1], case.given["first_visual"], case.given["n_visual"])
    block = SimpleNamespace(attention_norm=lambda x: x, queries=lambda x, cos, sin: query_HD[None, :, None])
    lm: Any = SimpleNamespace(layers=[block], angles=lambda positions: (None, None))  # the block does not rotate
    method, cache = FastV(budget=case.given["budget"], layer=0, queries="last", positions="retain"), cache_of(keys_HPD)
    case.close("attention", method.score(lm, cache, prefix, None)[0], weights_HP.mean(0), TOLERANCE)
    case.same("kept", slots(method(lm, cache, prefix).kept_BP), case["kept"].tolist())


def redvtp(case: RivalCase) -> None:
    weights_LHAK, n_prefix = case["attention"], case.given["n_prefix"]
    prefix = prompt(n_prefix, case.given["first_visual"], case.given["n_visual"])
    mean = AttentionMean(n_prefix)
    for weights_HAK in weights_LHAK:
        seen_by(mean, weights_HAK)
    open_BA = case["open"][None]
    first = FirstStep(mean.mean_BAP, torch.ones_like(open_BA), open_BA, torch.zeros(*open_BA.shape, 1))
    method, cache = RedVTP(budget=case.given["budget"], positions="retain"), cache_of(torch.zeros(1, n_prefix, 2))
    lm: Any = SimpleNamespace()
    case.close("importance", method.score(lm, cache, prefix, first)[prefix.visual_BP], case["importance"], TOLERANCE)
    kept_BP = method(lm, cache, prefix, first).kept_BP
    case.same("kept", slots(kept_BP & prefix.visual_BP), case["kept"].tolist())


def slots(marked_BP: Tensor) -> list[int]:
    found: list[int] = marked_BP[0].nonzero()[:, 0].tolist()
    return found


def prefixkv(case: RivalCase) -> None:
    if "mass" in case.tensors:
        mass_LP, forget_L = case["mass"], case["forget"]
        ours_L = torch.tensor(profile([list(mass_LP)], case.given["ratio"]), dtype=torch.float64)
        n, tolerance = mass_LP.shape[1], case.given["tolerance_rows"]
        case.close("shares, in rows,", ours_L * n, forget_L * n, tolerance)
        return
    weights_LHPP, forget_L = case["attention"], case["forget"]
    n = weights_LHPP.shape[-1]
    prefix, cache = prompt(n, 0, n), cache_of(*(torch.zeros(1, n, 2) for _ in weights_LHPP))
    mass = MassReceived(prefix.mask_BP)
    for weights_HPP in weights_LHPP:
        seen_by(mass, weights_HPP)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps({"forget": forget_L.tolist()}))
        short = LayerRetention(profile=str(path))(cache, prefix, mass)
    assert isinstance(short, RaggedPrefix)
    for layer, (position_BK, mask_BK) in enumerate(zip(short.positions, short.masks, strict=True)):
        kept = position_BK[0] if mask_BK is None else position_BK[mask_BK]
        case.same("kept", kept.tolist(), case[f"kept.{layer}"].tolist())


CACHES: dict[str, Check] = {"fastv": fastv, "redvtp": redvtp, "prefixkv": prefixkv}
