"""RedVTP step by step against a dense second computation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lavida_adapter import RedVTP
from lavida_adapter.engine import pick
from lavida_adapter.generate import denoise, start
from tests.lavida_adapter.cache_compression.prompts import (
    DECODE,
    MASK,
    N_TOKENS,
    VISUAL,
    A,
    P,
    best,
    kept_slots,
    made_prefix,
    row_and_mask,
    small,
)
from tests.lavida_adapter.dense import dense


@torch.no_grad()
@pytest.mark.parametrize("attention", ["full", "image_first"])
def test_redvtp_from_the_first_mask_to_the_last(attention: str) -> None:
    """Step by step with a dense network: rank by what the first step leaves masked, hide the rest from then on."""
    model, prefix = small(prefix_attention=attention), made_prefix()
    lm, mask_id = model.lm, model.config.lm.mask_token_id
    got = model.generate(
        prefix, replace(DECODE, keep_history=True), cache_selector=RedVTP(budget=2, positions="retain")
    )
    hidden: list[list[int]] = [[], []]
    seen: list[list[Tensor]] = [[], []]
    steps = []

    def logits_of(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        if len(steps) == 1:
            for b, n in enumerate(N_TOKENS):
                left = [n + a for a in range(A) if ids_BA[b, a] == mask_id]
                scores = [
                    sum(float(m[:, q, p].mean()) for m in seen[b] for q in left) if p < n else 0.0 for p in range(P)
                ]
                hidden[b] = [p for p in range(n) if VISUAL[b, p] and p not in best(scores, b, 2)]
        states = []
        for b, n in enumerate(N_TOKENS):
            maps: list[Tensor] = []
            row, allowed = row_and_mask(prefix, b, lm.embedding(ids_BA[b]), attention == "image_first", hidden[b])
            states.append(dense(lm, row, allowed, torch.arange(n + A), maps)[n:])
            seen[b] = seen[b] or maps
        steps.append(lm.logits(torch.stack(states)))
        return steps[-1] if want_BM is None else pick(steps[-1], want_BM)

    expected, forwards, _, history = denoise(
        logits_of,
        start(2, DECODE, mask_id, ()),
        replace(DECODE, keep_history=True),
        mask_id,
    )
    assert forwards == got.forwards == A
    assert got.cached_BP is not None
    for b in range(2):
        assert kept_slots(~got.cached_BP & MASK, b) == hidden[b] != []
    assert all(torch.equal(x, y) for x, y in zip(history, got.history, strict=True))
    assert torch.equal(expected, got.ids_BA)
