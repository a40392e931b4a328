"""Prefill of unequal prompts, padded and joined, engine by engine; a part of `experiments.bench.true_size`.

`python -m experiments.bench unequal` measures the same for any model of conf/model.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from experiments.bench.recorder import Bench, take_turns, time_ms
from experiments.bench.stage_times import ENGINES, key_of
from experiments.profiling import LmCost, Work, cost_of
from lavida_adapter.engine import DecodeEngine
from lavida_adapter.kv_cache import PrefixCache

LENGTHS = (490, 742, 918, 1092)
"""Tokens of the prompts: canvases of 406, 658, 834 and 1008 picture tokens, with 84 of text."""


def padding_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """bool [B, P]: False in the padding of a batch."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)


def calls_of(
    engines: Mapping[str, DecodeEngine], embeds_BPD: Tensor, lengths: Sequence[int], n_answer: int
) -> dict[tuple[str, str], Callable[[], PrefixCache]]:
    """The prefill of each engine by its name and "padded" or "joined"."""
    mask_BP = padding_of(lengths, embeds_BPD.device)
    given = embeds_BPD * mask_BP[..., None], mask_BP, None, n_answer, None
    calls: dict[tuple[str, str], Callable[[], PrefixCache]] = {}
    for name, engine in engines.items():
        calls[name, "padded"] = partial(engine.prefill, *given)
        calls[name, "joined"] = partial(engine.prefill, *given, tuple(lengths))
    return calls


def least_work(cost: LmCost, lengths: Sequence[int]) -> Work:
    """That of each prompt alone, but weights are read once."""
    each = [cost.prefill(n) for n in lengths]
    weights = each[0].bytes - cost.cache_bytes(lengths[0])
    return Work(sum(work.flops for work in each), weights + sum(map(cost.cache_bytes, lengths)))


def difference(found: PrefixCache, expected_BGPD: Tensor) -> float:
    """Distance of the last layer's keys, without padding, relative to their norm."""
    assert found.mask_BP is not None
    here = found.mask_BP[:, None, :, None]
    off = (found.keys[-1].float() - expected_BGPD.float()) * here
    return float(off.norm() / (expected_BGPD.float() * here).norm())


def measure_unequal(bench: Bench) -> None:
    """At the largest batch, but at least two prompts."""
    model, batch = bench.model, max(2, *bench.batches)
    lengths = [LENGTHS[-1 - i % len(LENGTHS)] for i in range(batch)]
    weight = model.lm.embedding.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(batch, max(lengths), weight.shape[1], generator=generator, device=weight.device)
    embeds_BPD = (noise * weight.float().std()).to(weight.dtype)
    engines = {name: ENGINES[name](model.lm) for name in bench.engines}
    least = least_work(cost_of(model.config.lm, model.dtype), lengths)
    calls = calls_of(engines, embeds_BPD, lengths, bench.n_answer)
    names = {ways: " ".join(ways) for ways in calls}
    keys = {name: key_of(bench, "unequal", engine, batch, way) for (engine, way), name in names.items()}
    timed = {names[n]: lambda call=call: {"prefill": time_ms(call, bench.device)} for n, call in calls.items()}
    about = {name: {"lengths": lengths, "work": {"prefill": [least.flops, least.bytes]}} for name in keys}
    take_turns(bench.recorder, keys, timed, bench.rounds_at(batch), about)
