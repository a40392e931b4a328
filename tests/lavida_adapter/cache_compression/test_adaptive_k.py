"""AdaptiveK: how many rows the first step's entropy leaves, and which."""

from dataclasses import replace

import torch

from lavida_adapter import AdaptiveK, Lavida
from lavida_adapter.cache_compression.adaptive_k import uncertainty
from tests.lavida_adapter.cache_compression.prompts import (
    N_TOKENS,
    N_VISUAL,
    A,
    D,
    first_step,
    kept_slots,
    made_prefix,
    row_and_mask,
)
from tests.lavida_adapter.dense import dense
from tests.lavida_adapter.tiny import noise


@torch.no_grad()
def test_a_sure_answer_keeps_fewer_rows_of_the_same_ranking(model: Lavida) -> None:
    """Ten candidates in one slot of the first prompt, three in the second's; levels of two, three and four rows."""
    prefix = made_prefix()
    logits = torch.full((2, A, 10), -1e9)
    logits[..., 0] = 0.0
    logits[0, 2] = 0.0
    logits[1, 1, :3] = 5.0
    first = replace(first_step(), logits_BAW=logits)
    torch.testing.assert_close(uncertainty(first).exp(), torch.tensor([10.0, 3.0]))
    cache = model.prefill(prefix)
    for bounds, counts in (((20.0, 30.0), (2, 2)), ((4.0, 20.0), (3, 2)), ((2.0, 4.0), (4, 3)), ((2.0, 2.5), (4, 4))):
        short = AdaptiveK(budget=4, candidates=bounds)(model.lm, cache, prefix, first)
        assert short.cache.keys[0].shape[2] == 4 + 7, "the shape is that of the last level"
        assert short.cache.mask_BP is not None and short.cache.mask_BP.sum(-1).tolist() == [
            counts[0] + 7,
            counts[1] + 6,
        ]
        for b, count in enumerate(counts):
            chosen = prefix.selections[b]
            assert chosen.scores_BN is not None
            last = 3 + N_VISUAL[b] - 1
            scores = {3 + i: float(chosen.scores_BN[0, i]) for i in range(N_VISUAL[b] - 1)}
            ranked = [last, *sorted(scores, key=lambda p: -scores[p])]
            assert kept_slots(short.kept_BP, b) == sorted(ranked[:count]), "what was synthesised stays first of all"


@torch.no_grad()
def test_masked_slots_are_as_good_as_gone(model: Lavida) -> None:
    prefix, answer = made_prefix(), noise(2, A, D, seed=1)
    sure = replace(first_step(), logits_BAW=100 * torch.eye(10)[None, :A].expand(2, -1, -1))
    cache = model.prefill(prefix)
    short = AdaptiveK(budget=4)(model.lm, cache, prefix, sure)
    for b, n in enumerate(N_TOKENS):
        gone = [p for p in range(n) if not short.kept_BP[b, p]]
        row, allowed = row_and_mask(prefix, b, answer[b], False, gone)
        expected = dense(model.lm, row, allowed, torch.arange(n + A))[n:]
        torch.testing.assert_close(model.lm.decode(answer, short.cache)[b], expected, rtol=0, atol=1e-5)
