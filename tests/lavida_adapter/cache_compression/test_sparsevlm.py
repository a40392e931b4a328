"""SparseVLM against loops written from the paper: Section 3.2, its raters and its ranking."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lavida_adapter import Lavida, Prefix, SparseVLM
from lavida_adapter.cache_compression.prompt_rows import text_behind, text_slots
from lavida_adapter.cache_compression.sparsevlm import raters
from tests.lavida_adapter.cache_compression.prompts import (
    FAMILIES,
    MASK,
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


def raters_by_loop(prefix: Prefix, b: int) -> list[int]:
    """Text slots behind the picture whose mean softmax weight over picture tokens is above the average."""
    first_behind = 3 + N_VISUAL[b]
    text, picture = range(first_behind, N_TOKENS[b]), range(3, first_behind)
    relation = dict.fromkeys(text, 0.0)
    for v in picture:
        products = {t: float((prefix.embeds_BPD[b, v] * prefix.embeds_BPD[b, t]).sum()) for t in text}
        total = sum(math.exp(product) for product in products.values())
        for t in text:
            relation[t] += math.exp(products[t]) / total / len(picture)
    mean = sum(relation.values()) / len(relation)
    return [t for t in text if relation[t] > mean]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_raters_are_related_more_than_the_average(seed: int) -> None:
    prefix = made_prefix(seed)
    slot_BQ, real_BQ = text_slots(prefix, text_behind(prefix, "a test"))
    got = raters(prefix, slot_BQ, real_BQ)
    for b in range(2):
        chosen = [int(slot_BQ[b, i]) for i in range(slot_BQ.shape[1]) if got[b, i]]
        assert chosen == raters_by_loop(prefix, b) and 0 < len(chosen) < N_TOKENS[b] - 3 - N_VISUAL[b]


@torch.no_grad()
def test_equal_relations_make_every_text_token_a_rater() -> None:
    """Nothing is above the average then, and a mean over no rater would be undefined."""
    prefix = made_prefix()
    prefix = replace(prefix, embeds_BPD=torch.ones(2, P, D) * MASK[..., None])
    slot_BQ, real_BQ = text_slots(prefix, text_behind(prefix, "a test"))
    assert torch.equal(raters(prefix, slot_BQ, real_BQ), real_BQ)
    assert real_BQ.sum(-1).tolist() == [4, 3]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["full", "image_first"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 5])
def test_sparsevlm_keeps_what_the_raters_look_at(family: str, attention: str, layer: int, seed: int) -> None:
    model: Lavida = small(family, prefix_attention=attention)
    prefix = made_prefix(seed)
    short = SparseVLM(budget=3, layer=layer)(model.lm, model.prefill(prefix), prefix)
    for b, n in enumerate(N_TOKENS):
        maps: list[Tensor] = []
        row, allowed = row_and_mask(prefix, b, noise(0, D), attention == "image_first", [])
        dense(model.lm, row, allowed, torch.arange(n), maps)
        asking = raters_by_loop(prefix, b)
        heads = len(maps[layer])
        scores = [
            sum(float(maps[layer][h, q, p]) for h in range(heads) for q in asking) / heads / len(asking)
            if p < n
            else 0.0
            for p in range(P)
        ]
        assert kept_slots(short.kept_BP, b) == best(scores, b, 3)
        assert bool(short.kept_BP[b, :n][~VISUAL[b, :n]].all()), "text stays"
