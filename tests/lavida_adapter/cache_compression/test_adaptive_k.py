"""AdaptiveK: how many rows the first step's entropy leaves, and which."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lavida_adapter import AdaptiveK, Lavida, Prefix
from lavida_adapter.cache_compression.adaptive_k import uncertainty
from tests.lavida_adapter.cache_compression.prompts import (
    DECODE,
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


def test_only_slots_that_were_masked_are_uncertain() -> None:
    """All ten tokens are equally likely where a token is fixed, two or one elsewhere."""
    logits = torch.full((3, A, 10), -1e9)
    logits[..., 0] = 0.0
    logits[:, 0] = 0.0
    logits[0, 2, 1] = 0.0
    masked_BA = torch.ones(3, A, dtype=torch.bool)
    masked_BA[0, 0] = masked_BA[2, 1:] = masked_BA[2, 0] = False
    first = replace(first_step(), logits_BAW=logits, masked_BA=masked_BA)
    torch.testing.assert_close(uncertainty(first).exp(), torch.tensor([2.0, 10.0, 1.0]))


@torch.no_grad()
def test_a_fixed_token_does_not_raise_the_level(model: Lavida) -> None:
    """What is predicted for a fixed token has more candidates than a bound, what is predicted for the masks has not."""
    prefix, found = made_prefix(), []

    class Watched(AdaptiveK):
        def kept_counts(self, prefix: Prefix, first: object, counts: tuple[int, ...]) -> Tensor:
            found.append(first)
            return super().kept_counts(prefix, first, counts)  # type: ignore[arg-type]

    drafts = [[5, 7, model.config.lm.mask_token_id], [6]]
    fixed = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    decode = replace(DECODE, schedule="linear")  # the first step of a time grid depends on the number of masks
    model.generate(prefix, decode, drafts=drafts, cache_selector=Watched(budget=4))
    (first,) = found
    assert torch.equal(first.masked_BA, ~fixed) and not bool((first.open_BA & fixed).any())
    candidates_BA = torch.special.entr(first.logits_BAW.softmax(-1)).sum(-1).exp()
    at_masks_B = candidates_BA.masked_fill(fixed, 0).amax(-1)
    assert bool((candidates_BA.amax(-1) > at_masks_B).any()), "a fixed token is the least certain slot of some prompt"
    bound = float(at_masks_B.amax()) + 1e-4
    selector = AdaptiveK(budget=4, levels=(0.5, 1.0), candidates=(bound,))
    out = model.generate(prefix, decode, drafts=drafts, cache_selector=selector)
    assert out.cached_BP is not None and [len(kept_slots(out.cached_BP, b)) for b in range(2)] == [2, 2]


def scored(*scores: float) -> Prefix:
    """Two prompts whose token selectors gave these scores to the first tokens of their pictures."""
    prefix = made_prefix()
    score_1N = torch.zeros(1, 9)
    score_1N[0, : len(scores)] = torch.tensor(scores)
    return replace(prefix, selections=tuple(replace(s, scores_BN=score_1N) for s in prefix.selections))


@torch.no_grad()
def test_tokens_that_were_kept_without_a_rank_come_last(model: Lavida) -> None:
    """In the first prompt slots 3 to 8 are tokens and slot 9 is synthesised; in the second 3 to 6, and 7."""
    inf = float("inf")
    first = replace(first_step(), logits_BAW=torch.zeros(2, A, 10))  # uncertain: all of the budget stays
    prefix = scored(-inf, -2.0, -inf, -3.4e38, 5.0, -inf)
    cache = model.prefill(prefix)
    for budget, kept in {
        1: ([9], [7]),
        2: ([7, 9], [4, 7]),
        3: ([4, 7, 9], [4, 6, 7]),
        4: ([4, 6, 7, 9], [3, 4, 6, 7]),
        5: ([3, 4, 6, 7, 9], [3, 4, 5, 6, 7]),
    }.items():
        short = AdaptiveK(budget=budget, candidates=(1.001, 1.002))(model.lm, cache, prefix, first)
        assert [kept_slots(short.kept_BP, b) for b in range(2)] == list(kept)
    none = scored(*[-inf] * 9)
    short = AdaptiveK(budget=2, candidates=(1.001, 1.002))(model.lm, cache, none, first)
    assert [kept_slots(short.kept_BP, b) for b in range(2)] == [[3, 9], [3, 7]]
    for wrong in (float("nan"), inf):
        with pytest.raises(RuntimeError, match="AdaptiveK: the score of a token is not finite"):
            AdaptiveK(budget=2)(model.lm, cache, scored(1.0, wrong), first)
