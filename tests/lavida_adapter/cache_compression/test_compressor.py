"""Cache selectors: what is left equals a dense mask over the rest, positions, batches; every option matters."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines import Full, Pooled
from lavida_adapter import DART, AdaptiveK, CacheSelector, FastV, Lavida, Prefix, PyramidDrop, RedVTP, SparseVLM
from lavida_adapter.cache_compression.compressor import reindex
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.kv_cache import PrefixCache
from lavida_adapter.language_model import rotary_angles, rotate
from tests.lavida_adapter.cache_compression.prompts import (
    DECODE,
    FAMILIES,
    MASK,
    N_TOKENS,
    VISUAL,
    A,
    D,
    P,
    alone,
    first_step,
    kept_slots,
    made_prefix,
    row_and_mask,
    small,
)
from tests.lavida_adapter.dense import dense
from tests.lavida_adapter.tiny import SIZES, noise, picture, tiny_model

FEW_PIVOTS = partial(DART, pivots_picture=1, pivots_text=1)
"""DART for a few rows."""
KNOBS: dict[Callable[..., CacheSelector], dict[str, Any]] = {
    FastV: {"budget": 3, "layer": 0, "queries": "text", "positions": "reindex"},
    RedVTP: {"budget": 3, "positions": "retain"},
    AdaptiveK: {"budget": 3, "levels": (0.75, 1.0), "candidates": (2.0,), "positions": "reindex"},
    SparseVLM: {"budget": 3, "layer": 0, "positions": "retain"},
    FEW_PIVOTS: {"budget": 3, "layer": 1, "pivots_picture": 2, "pivots_text": 0, "positions": "reindex"},
}
"""For every selector and each of its knobs, another value, which must change the cache."""
CASES = list(KNOBS)
BASE: dict[Callable[..., CacheSelector], dict[str, Any]] = {
    AdaptiveK: {"budget": 4, "levels": (0.5, 1.0), "candidates": (20.0,)},
    FEW_PIVOTS: {"budget": 4},
}
"""What the knobs are changed from; two rows where nothing is said."""


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("positions", ["retain", "reindex"])
@pytest.mark.parametrize("attention", ["full", "image_first"])
def test_keeping_every_row_changes_no_bit(
    build: Callable[..., CacheSelector], positions: str, attention: str, family: str
) -> None:
    model, prefix = small(family, prefix_attention=attention), made_prefix()
    cache = model.prefill(prefix)
    short = build(budget="matched", positions=positions)(model.lm, cache, prefix, first_step())
    assert torch.equal(short.kept_BP, MASK)
    assert short.cache.digest() == cache.digest()
    answer = noise(2, A, D, seed=1)
    assert torch.equal(model.lm.decode(answer, short.cache), model.lm.decode(answer, cache))
    plain = model.generate(prefix, DECODE)
    cut = model.generate(prefix, DECODE, cache_selector=build(budget="matched", positions=positions))
    assert torch.equal(plain.ids_BA, cut.ids_BA)
    assert plain.cached_BP is None and cut.cached_BP is not None and torch.equal(cut.cached_BP, MASK)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("attention", ["full", "image_first"])
def test_what_is_left_equals_a_dense_mask_over_the_rest(
    build: Callable[..., CacheSelector], attention: str, family: str
) -> None:
    model, prefix, answer = small(family, prefix_attention=attention), made_prefix(), noise(2, A, D, seed=1)
    cache = model.prefill(prefix)
    short = build(budget=3, positions="retain")(model.lm, cache, prefix, first_step())
    states = model.lm.decode(answer, short.cache)
    assert short.cache.keys[0].shape[2] == 3 + 7 and short.cache.next_position_B.tolist() == list(N_TOKENS)
    for b, n in enumerate(N_TOKENS):
        kept = kept_slots(short.kept_BP, b)
        assert len(kept) == 3
        gone = [p for p in range(n) if not short.kept_BP[b, p]]
        assert all(VISUAL[b, p] for p in gone)
        row, allowed = row_and_mask(prefix, b, answer[b], attention == "image_first", gone)
        expected = dense(model.lm, row, allowed, torch.arange(n + A))[n:]
        torch.testing.assert_close(states[b], expected, rtol=0, atol=1e-5)
        assert short.cache.positions_BP[b, : n - len(gone)].tolist() == [p for p in range(n) if p not in gone]
    assert (states - model.lm.decode(answer, cache)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("length", [40, 400])
def test_reindexed_keys_are_those_of_a_prefill_at_the_new_positions(model: Lavida, length: int) -> None:
    """Against k = W u rotated to 0, 1, 2, ... from the states that the prefill went through."""
    lm, embeds = model.lm, noise(2, length, D)
    cache, hidden = lm.prefill(embeds), []
    lm(embeds, hidden=hidden)
    slots = torch.stack([noise(length, seed=s).argsort()[: length // 2].sort().values for s in (1, 2)])
    short = reindex(cache.take(slots, None), lm)
    new = torch.arange(length // 2).expand(2, -1)
    assert torch.equal(short.positions_BP, new) and short.next_position_B.tolist() == [length // 2] * 2
    cos, sin = rotary_angles(new, lm.config.head_dim, lm.config.rope_theta)
    for i, block in enumerate(lm.layers):
        raw = block.key(block.attention_norm(hidden[i])).unflatten(-1, (-1, lm.config.head_dim))
        raw = torch.stack([raw[b, slots[b]] for b in range(2)]).transpose(1, 2)
        torch.testing.assert_close(short.keys[i], rotate(raw, cos, sin), rtol=0, atol=1e-5)
        for b in range(2):
            assert torch.equal(short.values[i][b], cache.values[i][b][:, slots[b]])


@torch.no_grad()
def test_reindexing_is_exact_far_from_the_start(model: Lavida) -> None:
    """Angles of thousands are rounded by 1e-4 in float32: the difference has to be taken between the rounded ones."""
    lm, n = model.lm, 4000
    raw = noise(1, 2, n, lm.config.head_dim)
    old = torch.arange(n)[None]
    keys = rotate(raw, *rotary_angles(old, lm.config.head_dim, lm.config.rope_theta))
    slots = torch.arange(1, n, 4)[None]
    short = reindex(PrefixCache((keys,), (raw,), None, old, torch.tensor([n])).take(slots, None), lm)
    new = rotary_angles(torch.arange(n // 4)[None], lm.config.head_dim, lm.config.rope_theta)
    torch.testing.assert_close(short.keys[0], rotate(raw[:, :, slots[0]], *new), rtol=0, atol=2e-6)


@torch.no_grad()
def test_reindexing_a_padded_batch_closes_every_gap(model: Lavida) -> None:
    prefix = made_prefix()
    short = FastV(budget=2, positions="reindex")(model.lm, model.prefill(prefix), prefix).cache
    assert short.positions_BP.tolist() == [list(range(9))] * 2
    assert short.mask_BP is not None and short.mask_BP.sum(-1).tolist() == [9, 8] == short.next_position_B.tolist()


@torch.no_grad()
@pytest.mark.parametrize("build", CASES)
def test_the_cache_is_written_once_and_cut_once(
    build: Callable[..., CacheSelector], model: Lavida, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, digests, prefills = made_prefix(), [], []
    step, prefill = DecodeSteps.__call__, model.prefill

    def watched(steps: DecodeSteps, *args: Any, **kwargs: Any) -> Tensor:
        logits = step(steps, *args, **kwargs)
        lengths = steps.reader.lengths
        keys, values = (tuple(steps.reader.open(i)[kind][:, :, : lengths[i]] for i in range(3)) for kind in (0, 1))
        digests.append(replace(steps.cache, keys=keys, values=values).digest())
        return logits

    monkeypatch.setattr(DecodeSteps, "__call__", watched)
    monkeypatch.setattr(model, "prefill", lambda *a: (prefills.append(1), prefill(*a))[1])
    out = model.generate(prefix, DECODE, cache_selector=build(budget=2))
    # The first token of a Dream comes from the prefill, and half of its four steps fill nothing.
    assert out.forwards == len(digests) == (2 if model.lm.shift else A) and len(prefills) == 1
    whole = prefill(prefix).digest()
    if build(budget=2).after == "first_step":
        assert digests[0] == whole
        digests = digests[1:]
    assert len(set(digests)) == 1 and digests[0] != whole


@torch.no_grad()
@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("positions", ["retain", "reindex"])
def test_a_prompt_does_not_depend_on_its_batch_mates(
    build: Callable[..., CacheSelector], positions: str, model: Lavida
) -> None:
    prefix, selector = made_prefix(), build(budget=2, positions=positions)
    together = model.generate(prefix, DECODE, cache_selector=selector)
    for b in range(2):
        by_itself = model.generate(alone(prefix, b), DECODE, cache_selector=selector)
        assert together.cached_BP is not None and by_itself.cached_BP is not None
        assert torch.equal(together.cached_BP[b, : N_TOKENS[b]], by_itself.cached_BP[0])
        assert torch.equal(together.ids_BA[b], by_itself.ids_BA[0])


@torch.no_grad()
def test_equal_scores_go_to_the_first_rows_and_slots_do_not_depend_on_content(model: Lavida) -> None:
    flat = replace(first_step(), attention_BAP=torch.ones(2, A, P))
    prefix = made_prefix()
    short = RedVTP(budget=3)(model.lm, model.prefill(prefix), prefix, flat)
    assert [kept_slots(short.kept_BP, b) for b in range(2)] == [[3, 4, 5]] * 2
    done = replace(first_step(), open_BA=torch.zeros(2, A, dtype=torch.bool))
    nothing = RedVTP(budget=3)(model.lm, model.prefill(prefix), prefix, done)
    assert torch.equal(nothing.kept_BP, short.kept_BP)
    for seed in range(3):
        other = made_prefix(seed)
        cut = RedVTP(budget=3)(model.lm, model.prefill(other), other, first_step(seed))
        assert [k.shape for k in cut.cache.keys] == [(2, 2, 10, 8)] * 3


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [FastV, SparseVLM, FEW_PIVOTS])
def test_scores_are_float32_in_a_bfloat16_model(build: Callable[..., CacheSelector], family: str) -> None:
    model, prefix = in_bfloat16(family)
    cache = model.prefill(prefix)
    assert build(budget=2).score(model.lm, cache, prefix, None).dtype == torch.float32
    short = build(budget=2, positions="reindex")(model.lm, cache, prefix).cache
    assert {t.dtype for t in (*short.keys, *short.values)} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [RedVTP, PyramidDrop])
def test_a_bfloat16_model_is_cut(build: Callable[..., CacheSelector], family: str) -> None:
    model, prefix = in_bfloat16(family)
    out = model.generate(prefix, DECODE, cache_selector=build(budget=2))
    assert out.cached_BP is not None and out.cache is not None
    last = 2 if build is RedVTP else 1
    assert out.cached_BP.sum(-1).tolist() == [7 + last, 6 + last]
    assert {t.dtype for t in out.cache.layer(2)} == {torch.bfloat16}


def in_bfloat16(family: str) -> tuple[Lavida, Prefix]:
    prefix = made_prefix()
    return small(family).to(torch.bfloat16), replace(prefix, embeds_BPD=prefix.embeds_BPD.to(torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize(("build", "knob"), [(build, knob) for build, knobs in KNOBS.items() for knob in knobs])
def test_every_knob_changes_the_cache(build: Callable[..., CacheSelector], knob: str, model: Lavida) -> None:
    assert KNOBS[build].keys() == inspect.signature(build).parameters.keys()
    prefix = made_prefix(3)
    cache = model.prefill(prefix)
    base = BASE.get(build, {"budget": 2})
    before, after = (build(**knobs) for knobs in (base, {**base, knob: KNOBS[build][knob]}))
    one, other = (s(model.lm, cache, prefix, first_step()).cache for s in (before, after))
    assert one.digest() != other.digest()


@torch.no_grad()
def test_matched_is_what_lavida_itself_would_feed() -> None:
    model = tiny_model()
    images, questions = [picture(size) for size in SIZES], ["what?"] * len(SIZES)
    pooled = model.encode(images, questions, Pooled())
    assert pooled.n_matched == pooled.n_visual
    full = model.encode(images, questions, Full())
    out = model.generate(full, DECODE, cache_selector=FastV(budget="matched"))
    assert out.cached_BP is not None
    assert tuple((out.cached_BP & full.visual_BP).sum(-1).tolist()) == pooled.n_visual
    assert bool((out.cached_BP | full.visual_BP | ~full.mask_BP).all()), "text stays"


def test_padding_is_never_in_a_cut_cache(model: Lavida) -> None:
    """Enormous numbers in padded slots change no kept row."""
    prefix = made_prefix()
    spoiled = replace(prefix, embeds_BPD=prefix.embeds_BPD.masked_fill(~MASK[..., None], 1e4))
    for build in CASES:
        one, other = (model.generate(p, DECODE, cache_selector=build(budget=2)) for p in (prefix, spoiled))
        assert one.cached_BP is not None and other.cached_BP is not None
        assert torch.equal(one.cached_BP, other.cached_BP) and torch.equal(one.ids_BA, other.ids_BA)
        assert not bool((one.cached_BP & ~MASK).any())
