"""FastV ranks by the attention of a dense second computation."""

import pytest
import torch
from torch import Tensor

from lavida_adapter import FastV, Lavida
from lavida_adapter.cache_compression.prompt_rows import prompt_attention
from tests.lavida_adapter.cache_compression.prompts import (
    FAMILIES,
    N_TOKENS,
    N_VISUAL,
    VISUAL,
    D,
    P,
    best,
    kept_slots,
    made_prefix,
    row_and_mask,
    small,
)
from tests.lavida_adapter.dense import dense
from tests.lavida_adapter.tiny import noise


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["full", "image_first"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_of_the_prompt_s_attention(family: str, attention: str, layer: int) -> None:
    """Single rows run again against the cache equal the rows of the whole map."""
    model, prefix = small(family, prefix_attention=attention), made_prefix()
    slots = torch.tensor([[0, 2, 11, 13], [1, 8, 9, 10]])
    got = prompt_attention(model.lm, model.prefill(prefix), prefix.embeds_BPD, slots, layer)
    for b, n in enumerate(N_TOKENS):
        maps: list[Tensor] = []
        row, allowed = row_and_mask(prefix, b, noise(0, D), attention == "image_first", [])
        dense(model.lm, row, allowed, torch.arange(n), maps)
        expected = maps[layer].mean(0)[slots[b]]
        torch.testing.assert_close(got[b, :, :n], expected, rtol=0, atol=1e-6)
        assert bool((got[b, :, n:] == 0).all())


@torch.no_grad()
@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_fastv_keeps_what_the_prompt_looks_at(model: Lavida, queries: str, layer: int) -> None:
    prefix = made_prefix()
    selector = FastV(budget=3, layer=layer, queries=queries)
    short = selector(model.lm, model.prefill(prefix), prefix)
    for b, n in enumerate(N_TOKENS):
        maps: list[Tensor] = []
        dense(model.lm, *row_and_mask(prefix, b, noise(0, D), False, []), torch.arange(n), maps)
        asking = [n - 1] if queries == "last" else [p for p in range(n) if not VISUAL[b, p]]
        scores = [float(maps[layer][:, asking, p].mean()) if p < n else 0.0 for p in range(P)]
        assert kept_slots(short.kept_BP, b) == best(scores, b, 3)
        assert short.kept_BP[b].sum() == 3 + n - N_VISUAL[b]
