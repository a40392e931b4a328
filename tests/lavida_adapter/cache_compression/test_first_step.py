"""Methods that decide after the first step: it comes, a second one follows, and other prompts change nothing."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lavida_adapter import AdaptiveK, CacheSelector, DecodeConfig, Lavida, RedVTP
from shirg import UserError
from tests.lavida_adapter.cache_compression.prompts import (
    DECODE,
    FAMILIES,
    MASK,
    N_TOKENS,
    N_VISUAL,
    alone,
    made_prefix,
    small,
)

METHODS: list[CacheSelector] = [RedVTP(budget=2), AdaptiveK(budget=2, candidates=(1.001, 1.002))]
CUT = [n - visual + 2 for n, visual in zip(N_TOKENS, N_VISUAL, strict=True)]
"""Rows of a cache with two of its picture."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("schedule", ["none", "time_grid", "linear", "shift"])
def test_an_answer_is_cut_or_refused(method: CacheSelector, schedule: str, family: str) -> None:
    """By the forwards of the same decoding without a cache method: two are needed, however many steps it may have."""
    model, prefix, counts = small(family), made_prefix(), []
    for n, steps, block in product(range(1, 6), (None, 1, 2, 3), (None, 1)):
        decode = DecodeConfig(max_new_tokens=n, step_per_block=steps, block_length=block, schedule=schedule)
        forwards = model.generate(prefix, decode).forwards
        counts.append(forwards)
        if forwards < 2:
            with pytest.raises(UserError, match=f"takes {'only one' if forwards else 'none'}: choose a longer answer"):
                model.generate(prefix, decode, cache_selector=method)
            continue
        out = model.generate(prefix, decode, cache_selector=method)
        assert out.forwards == forwards and out.cached_BP is not None
        assert out.cached_BP.sum(-1).tolist() == CUT, decode
    assert min(counts) == model.lm.shift * -1 + 1 and max(counts) > 3


def test_the_cases_that_were_not_cut() -> None:
    """A time grid has up to three steps for three tokens, of which one fills something where slot 0 is filled."""
    for family, n, schedule in (("dream", 2, "none"), ("dream", 3, "none"), ("llada", 2, "time_grid")):
        decode = DecodeConfig(max_new_tokens=n, schedule=schedule)
        assert decode.steps == n
        with pytest.raises(UserError, match="takes only one"):
            small(family).generate(made_prefix(), decode, cache_selector=RedVTP(budget=2))
    out = small("dream").generate(
        made_prefix(), DecodeConfig(max_new_tokens=3, schedule="linear"), cache_selector=RedVTP(budget=2)
    )
    assert out.forwards == 2 and out.cached_BP is not None and out.cached_BP.sum(-1).tolist() == CUT


def test_every_step_of_the_published_sampler_runs() -> None:
    """Also those that fill nothing: two for two tokens, of which the prompt predicts one."""
    decode = DecodeConfig(max_new_tokens=2, parity=True, allow_mask_token=True)
    out = small("dream").generate(made_prefix(), decode, cache_selector=RedVTP(budget=2))
    assert out.forwards == 2 and out.cached_BP is not None and out.cached_BP.sum(-1).tolist() == CUT
    with pytest.raises(UserError, match="takes only one"):
        small("dream").generate(made_prefix(), replace(decode, step_per_block=1), cache_selector=RedVTP(budget=2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_answer_that_is_complete_before_the_cut_says_so(method: CacheSelector, family: str) -> None:
    """Where the content decides: an answer of one step has read the whole prefix, whatever its neighbour did."""
    model, prefix, seen = small(family), made_prefix(2), set()
    for threshold in np.geomspace(0.01, 0.05, 12).tolist():
        decode = DecodeConfig(max_new_tokens=4, threshold=threshold)
        together = model.generate(prefix, decode, cache_selector=method)
        assert together.cached_BP is not None
        for b, n in enumerate(N_TOKENS):
            assert int(together.cached_BP[b].sum()) == (n if together.steps[b] == 1 else CUT[b])
            by_itself = model.generate(alone(prefix, b), decode, cache_selector=method)
            assert by_itself.cached_BP is not None and by_itself.steps == together.steps[b : b + 1]
            assert torch.equal(by_itself.cached_BP[0], together.cached_BP[b, :n])
            assert torch.equal(by_itself.ids_BA[0], together.ids_BA[b])
        seen.add(tuple(steps == 1 for steps in together.steps))
    assert (True, True) in seen and (False, False) in seen and len(seen) > 2, "also one without the other"


def test_an_answer_that_ends_with_the_prompt_is_not_cut() -> None:
    """Slot 0 is the first eos of one of the prompts: no step is left for its answer."""
    model, prefix = small("dream"), made_prefix()
    decode = replace(DECODE, early_stop=True)
    (eos,) = {int(i) for i in model.generate(prefix, DECODE).ids_BA[1:, 0]}
    model.config = replace(model.config, lm=replace(model.config.lm, eos_token_id=eos))
    out = model.generate(prefix, decode, cache_selector=RedVTP(budget=2))
    assert out.steps[1] == 0 < out.steps[0] and out.cached_BP is not None
    assert torch.equal(out.cached_BP[1], MASK[1]) and int(out.cached_BP[0].sum()) == CUT[0]


DRAFTS: list[list[int]] = [[], [5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
DECODINGS: list[dict[str, Any]] = [
    {},
    {"block_length": 1},
    {"block_length": 2},
    {"block_length": 3, "schedule": "time_grid"},
    {"schedule": "time_grid"},
    {"schedule": "linear", "step_per_block": 3},
    {"threshold": 0.04},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", DECODINGS, ids=str)
def test_drafts_of_a_batch(options: dict[str, Any], family: str) -> None:
    """A batch is cut as its prompts are one at a time, or refused because their first steps differ."""
    model, prefix, method = small(family), made_prefix(), RedVTP(budget=2)
    decode = DecodeConfig(max_new_tokens=6, **options)
    refused: list[tuple[int, int]] = []
    for first, second in product(DRAFTS, DRAFTS):
        drafts = [first, second]
        try:
            each = [model.generate(alone(prefix, b), decode, drafts=[drafts[b]], cache_selector=method) for b in (0, 1)]
        except UserError as error:
            assert "takes only one" in str(error)
            with pytest.raises(UserError, match="takes only one|comes at different times"):
                model.generate(prefix, decode, drafts=drafts, cache_selector=method)
            continue
        try:
            together = model.generate(prefix, decode, drafts=drafts, cache_selector=method)
        except UserError as error:
            assert "comes at different times" in str(error)
            refused.append((len(first), len(second)))
            continue
        assert together.cached_BP is not None
        for b, by_itself in enumerate(each):
            assert by_itself.cached_BP is not None
            assert torch.equal(together.cached_BP[b, : N_TOKENS[b]], by_itself.cached_BP[0]), drafts
            assert torch.equal(together.ids_BA[b], by_itself.ids_BA[0]) and together.steps[b] == by_itself.steps[0]
    assert not any(a == b for a, b in refused)
    in_one_block = "block_length" not in options and "time_grid" not in (options.get("schedule"), default_of(model))
    assert (refused == []) == (in_one_block or "threshold" in options or options.get("schedule") == "linear")


def default_of(model: Lavida) -> str:
    """The schedule where none is given."""
    return "time_grid" if model.lm.shift else "none"
