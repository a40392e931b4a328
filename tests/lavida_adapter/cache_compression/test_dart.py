"""DART against a loop written from the paper, Section 3: pivots, and what is least similar to each of them."""

import pytest
import torch
from torch import Tensor

from lavida_adapter import DART, Lavida
from lavida_adapter.cache_compression.prompt_rows import prompt_states
from lavida_adapter.language_model import rotary_angles, rotate
from tests.lavida_adapter.cache_compression.prompts import (
    FAMILIES,
    N_TOKENS,
    N_VISUAL,
    P,
    alone,
    kept_slots,
    made_prefix,
    small,
)


def states_of(model: Lavida, seed: int, b: int) -> list[Tensor]:
    """The states [n, D] of one prompt at the input of every layer."""
    prefix, hidden = alone(made_prefix(seed), b), []
    model.lm(prefix.embeds_BPD, visual_BL=model.visual(prefix.visual_BP), hidden=hidden)
    return [x[0] for x in hidden]


def shares_by_loop(left: int, n_pivots: int) -> list[int]:
    """Rows dealt one by one to the pivots in turn."""
    shares = [0] * n_pivots
    for i in range(left):
        shares[i % n_pivots] += 1
    return shares


def dart_by_loop(model: Lavida, seed: int, b: int, layer: int, budget: int, pictures: int, texts: int) -> list[int]:
    lm, hidden = model.lm, states_of(model, seed, b)
    u = lm.layers[layer - 1].attention_norm(hidden[layer - 1])
    raw = lm.layers[layer - 1].key(u).unflatten(-1, (-1, lm.config.head_dim)).transpose(0, 1)
    angles = rotary_angles(torch.arange(len(u))[None], lm.config.head_dim, lm.config.rope_theta)
    keys = rotate(raw[None], *angles)[0]
    norm = [sum(float(keys[h, p].abs().sum()) for h in range(len(keys))) for p in range(len(u))]
    states = lm.final_norm(hidden[layer])

    def cosine(p: int, q: int) -> float:
        return float((states[p] * states[q]).sum() / states[p].norm() / states[q].norm())

    behind = 3 + N_VISUAL[b]
    picture = sorted(range(3, behind), key=lambda p: -norm[p])[:pictures]
    pivots = picture + sorted(range(behind, len(u)), key=lambda p: -norm[p])[:texts]
    kept, free = list(picture), [p for p in range(3, behind) if p not in picture]
    for pivot, share in zip(pivots, shares_by_loop(budget - pictures, len(pivots)), strict=True):
        taken = sorted(free, key=lambda p: (cosine(pivot, p), p))[:share]
        kept += taken
        free = [p for p in free if p not in taken]
    return sorted(kept)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["full", "image_first"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("budget", "pictures", "texts"), [(5, 1, 1), (4, 2, 2), (5, 1, 4), (3, 3, 0), (3, 1, 9)])
def test_dart_keeps_pivots_and_what_is_unlike_them(
    family: str, attention: str, layer: int, budget: int, pictures: int, texts: int
) -> None:
    """The second prompt has three text tokens behind its picture: it has fewer pivots where more are asked for."""
    model = small(family, prefix_attention=attention)
    selector = DART(budget=budget, layer=layer, pivots_picture=pictures, pivots_text=texts)
    for seed in range(3):
        prefix = made_prefix(seed)
        short = selector(model.lm, model.prefill(prefix), prefix)
        for b in range(2):
            assert kept_slots(short.kept_BP, b) == dart_by_loop(model, seed, b, layer, budget, pictures, texts)
        assert short.kept_BP.sum(-1).tolist() == [budget + 7, budget + 6]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["full", "image_first"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_states_that_run_again_are_those_of_the_prefill(family: str, attention: str, layer: int) -> None:
    """Also of picture tokens that cannot see the question."""
    model, prefix = small(family, prefix_attention=attention), made_prefix()
    got = prompt_states(model.lm, model.prefill(prefix), prefix.embeds_BPD, layer)
    assert got.shape == (2, P, model.config.lm.d_model)
    for b, n in enumerate(N_TOKENS):
        torch.testing.assert_close(got[b, :n], states_of(model, 0, b)[layer], rtol=0, atol=1e-5)


def test_a_cut_or_repeated_cache_still_knows_its_picture() -> None:
    model, prefix = small(prefix_attention="image_first"), made_prefix()
    cache = model.prefill(prefix)
    assert cache.visual_BP is not None and torch.equal(cache.visual_BP, prefix.visual_BP)
    slots = torch.tensor([[1, 4, 12], [0, 3, 9]])
    taken, twice = cache.take(slots, None).visual_BP, cache.repeat(2).visual_BP
    assert taken is not None and torch.equal(taken, prefix.visual_BP.gather(1, slots))
    assert twice is not None and torch.equal(twice, prefix.visual_BP.repeat(2, 1))
    assert small().prefill(prefix).visual_BP is None
