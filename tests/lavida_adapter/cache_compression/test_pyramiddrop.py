"""PyramidDrop against loops written from the paper, Section 3: how many rows a stage keeps, which, and what they do."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter import FastV, Lavida, PyramidDrop
from lavida_adapter.cache_compression.pyramiddrop import first_layers, rows_of_stages
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.kv_cache import RaggedPrefix
from tests.lavida_adapter.cache_compression.prompts import (
    DECODE,
    FAMILIES,
    MASK,
    N_TOKENS,
    N_VISUAL,
    VISUAL,
    A,
    alone,
    made_prefix,
    small,
)

L = 3


def turned(x_HND: Tensor, places: list[int], theta: float) -> Tensor:
    """Rotary positions as complex numbers."""
    half = x_HND.shape[-1] // 2
    angles = torch.tensor(places)[:, None] * theta ** (-torch.arange(half) / half)
    z = torch.complex(*x_HND.split(half, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


class ByHand:
    """One prompt: raw keys and values of every layer, and attention written out over chosen rows."""

    def __init__(self, model: Lavida, seed: int, b: int) -> None:
        prefix, hidden = alone(made_prefix(seed), b), []
        self.lm, self.embeds, self.n = model.lm, prefix.embeds_BPD[0], N_TOKENS[b]
        self.lm(prefix.embeds_BPD, visual_BL=model.visual(prefix.visual_BP), hidden=hidden)
        self.picture = [p for p in range(self.n) if VISUAL[b, p]]
        self.states = [x[0] for x in hidden]
        self.theta = self.lm.config.rope_theta

    def heads(self, x_ND: Tensor) -> Tensor:
        return x_ND.unflatten(-1, (-1, self.lm.config.head_dim)).transpose(0, 1)

    def raw_keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        block = self.lm.layers[layer]
        u = block.attention_norm(self.states[layer])
        return self.heads(block.key(u)), self.heads(block.value(u))

    def weights(self, layer: int, x_QD: Tensor, at: list[int], keys_HND: Tensor) -> Tensor:
        """Attention [H, Q, N] of states at positions `at` to rotated keys."""
        block = self.lm.layers[layer]
        q = turned(self.heads(block.query(block.attention_norm(x_QD))), at, self.theta)
        keys = keys_HND.repeat_interleave(len(q) // len(keys_HND), 0)
        return (q @ keys.transpose(1, 2) / self.lm.config.head_dim**0.5).softmax(-1)

    def onward(self, layer: int, x_QD: Tensor, weights_HQN: Tensor, values_HND: Tensor) -> Tensor:
        block = self.lm.layers[layer]
        values = values_HND.repeat_interleave(len(weights_HQN) // len(values_HND), 0)
        x = x_QD + block.attention_out((weights_HQN @ values).transpose(0, 1).flatten(1))
        u = block.mlp_norm(x)
        return x + block.down(torch.nn.functional.silu(block.gate(u)) * block.up(u))

    def places(self, alive: list[int], positions: str) -> list[int]:
        """As in the paper's code, a shorter prompt is counted anew from 0."""
        return list(range(len(alive))) if positions == "reindex" else alive

    def drops(self, starts: list[int], counts: list[int], positions: str) -> list[list[int]]:
        """The slots that each layer keeps: at each stage the last token's attention ranks what is left."""
        alive, kept, x = list(range(self.n)), [], self.embeds[-1:]
        for layer in range(L):
            k, v = self.raw_keys_values(layer)
            if layer in starts:
                at = self.places(alive, positions)
                row = self.weights(layer, x, at[-1:], turned(k[:, alive], at, self.theta)).mean(0)[0]
                score = {p: float(row[i]) for i, p in enumerate(alive)}
                ranked = sorted((p for p in alive if p in self.picture), key=lambda p: (-score[p], p))
                best = ranked[: counts[starts.index(layer)]]
                alive = [p for p in alive if p not in self.picture or p in best]
            at = self.places(alive, positions)
            x = self.onward(layer, x, self.weights(layer, x, at[-1:], turned(k[:, alive], at, self.theta)), v[:, alive])
            kept.append(alive)
        return kept

    def logits(self, kept: list[list[int]], ids: Tensor, positions: str) -> Tensor:
        """A first step in which each layer has its own prompt, with the answer directly behind it."""
        x = self.lm.embedding(ids)
        for layer, alive in enumerate(kept):
            k, v = self.raw_keys_values(layer)
            begin = len(alive) if positions == "reindex" else self.n
            here = [*self.places(alive, positions), *range(begin, begin + len(ids))]
            block = self.lm.layers[layer]
            u = block.attention_norm(x)
            own_k, own_v = self.heads(block.key(u)), self.heads(block.value(u))
            keys = turned(torch.cat([k[:, alive], own_k], dim=1), here, self.theta)
            weights = self.weights(layer, x, here[-len(ids) :], keys)
            x = self.onward(layer, x, weights, torch.cat([v[:, alive], own_v], dim=1))
        # Of a Dream the row before predicts a slot; the row before the first one is in the prompt.
        rows = [max(0, slot - self.lm.shift) for slot in range(len(ids))]
        return self.lm.logits(self.lm.final_norm(x))[rows]


def cut(model: Lavida, seed: int = 0, **options: Any) -> tuple[RaggedPrefix, Tensor]:
    prefix = made_prefix(seed)
    short = PyramidDrop(**options)(model.lm, model.prefill(prefix), prefix)
    assert isinstance(short.cache, RaggedPrefix)
    return short.cache, short.kept_BP


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["full", "image_first"])
@pytest.mark.parametrize("positions", ["retain", "reindex"])
@pytest.mark.parametrize(
    ("options", "starts", "counts"),
    [
        ({"budget": 3}, [0, 1, 2], [[5, 3, 1], [5, 3, 1]]),
        ({"budget": 4}, [0, 1, 2], [[7, 3, 2], [5, 5, 2]]),
        ({"budget": 3, "stages": (0.5,)}, [0, 2], [[3, 2], [3, 2]]),
        ({"budget": 4, "ratio": None}, [0, 1, 2], [[7, 3, 2], [5, 4, 3]]),
        ({"budget": 2, "ratio": 0.1}, [0, 1, 2], [[5, 1, 0], [5, 1, 0]]),
    ],
)
def test_every_layer_keeps_what_the_last_token_looks_at(
    family: str, attention: str, positions: str, options: dict[str, Any], starts: list[int], counts: list[list[int]]
) -> None:
    """Rows, positions, keys and values; a first step over them equals one with a prompt of its own in each layer."""
    model = small(family, prefix_attention=attention)
    for seed in range(3):
        cache, kept_BP = cut(model, seed, positions=positions, **options)
        ids = torch.full((2, A), model.config.lm.mask_token_id)
        logits = DecodeSteps(model.lm, cache, A)(ids)
        for b, n in enumerate(N_TOKENS):
            hand = ByHand(model, seed, b)
            kept = hand.drops(starts, counts[b], positions)
            for layer, alive in enumerate(kept):
                mask_BK = cache.mask(layer)
                real = torch.ones(cache.n_slots(layer), dtype=torch.bool) if mask_BK is None else mask_BK[b]
                stage = max(i for i, start in enumerate(starts) if start <= layer)
                assert len(alive) == counts[b][stage] + n - N_VISUAL[b] == int(real.sum())
                k, v = (x[:, alive] for x in hand.raw_keys_values(layer))
                at = [p + n - len(alive) for p in range(len(alive))] if positions == "reindex" else alive
                assert cache.positions[layer][b, real].tolist() == at
                torch.testing.assert_close(cache.values[layer][b][:, real], v, rtol=0, atol=1e-5)
                torch.testing.assert_close(cache.keys[layer][b][:, real], turned(k, at, hand.theta), rtol=0, atol=1e-5)
            assert kept_BP[b].nonzero().flatten().tolist() == kept[-1], "what every layer has"
            torch.testing.assert_close(logits[b], hand.logits(kept, ids[b], positions), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["retain", "reindex"])
def test_keeping_every_row_changes_no_bit(positions: str, model: Lavida) -> None:
    prefix = made_prefix()
    whole = model.prefill(prefix)
    cache, kept_BP = cut(model, budget="matched", positions=positions)
    assert torch.equal(kept_BP, MASK)
    for layer in range(L):
        assert torch.equal(cache.keys[layer], whole.keys[layer])
        assert torch.equal(cache.values[layer], whole.values[layer])
    plain = model.generate(prefix, DECODE)
    out = model.generate(prefix, DECODE, cache_selector=PyramidDrop(budget="matched", positions=positions))
    assert torch.equal(plain.ids_BA, out.ids_BA)


@torch.no_grad()
def test_a_ratio_of_one_is_a_single_drop_in_the_first_layer(model: Lavida) -> None:
    """Then every layer keeps the same rows, and this is FastV at layer 0."""
    prefix = made_prefix()
    cache, kept_BP = cut(model, budget=3, ratio=1.0, positions="retain")
    fastv = FastV(budget=3, layer=0)(model.lm, model.prefill(prefix), prefix)
    assert torch.equal(kept_BP, fastv.kept_BP)
    for layer in range(L):
        for ours, theirs in zip(cache.layer(layer), fastv.cache.layer(layer), strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["retain", "reindex"])
def test_a_prompt_does_not_depend_on_its_batch_mates(positions: str, model: Lavida) -> None:
    prefix, selector = made_prefix(), PyramidDrop(budget=2, positions=positions)
    together = model.generate(prefix, DECODE, cache_selector=selector)
    for b in range(2):
        by_itself = model.generate(alone(prefix, b), DECODE, cache_selector=selector)
        assert together.cached_BP is not None and by_itself.cached_BP is not None
        assert torch.equal(together.cached_BP[b, : N_TOKENS[b]], by_itself.cached_BP[0])
        assert torch.equal(together.ids_BA[b], by_itself.ids_BA[0])


KNOBS: dict[str, Any] = {"budget": 3, "ratio": None, "stages": (0.5,), "positions": "retain"}


@torch.no_grad()
@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_changes_the_cache(knob: str, model: Lavida) -> None:
    base = {"budget": 4}
    one, other = (cut(model, **options)[0] for options in (base, {**base, knob: KNOBS[knob]}))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one.keys, other.keys, strict=True))


def test_the_papers_own_schedule() -> None:
    """576 rows, 32 layers, four stages that halve: 15/32 of the rows as a mean."""
    assert first_layers((0.25, 0.5, 0.75), 32) == [0, 8, 16, 24]
    assert rows_of_stages(576, 270, [8] * 4, 0.5) == [576, 288, 144, 72]
    assert rows_of_stages(576, 270, [8] * 4, None) == [576, 288, 144, 72]


def test_a_budget_off_the_schedule_moves_the_height_of_the_first_stage() -> None:
    assert rows_of_stages(576, 135, [8] * 4, 0.5) == [288, 144, 72, 36]
    assert rows_of_stages(576, 405, [8] * 4, 0.5) == [576, 576, 312, 156]
    assert rows_of_stages(336, 80, [1, 1, 1], 0.5) == [137, 69, 34]


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1, None])
def test_the_mean_over_layers_is_the_budget(ratio: float | None) -> None:
    draw = random.Random(3)
    for _ in range(300):
        n, stages = draw.randint(1, 700), draw.randint(2, 5)
        equal = [draw.randint(1, 8)] * stages
        for sizes in (equal, [draw.randint(1, 8) for _ in range(stages)]):
            least = 1 if ratio is not None else -(-n * sizes[0] // sum(sizes))
            budget = draw.randint(least, n)
            rows = rows_of_stages(n, budget, sizes, ratio)
            total = sum(size * r for size, r in zip(sizes, rows, strict=True))
            short = budget * sum(sizes) - total
            assert short == 0 if sizes == equal else 0 <= short < sum(sizes)
            assert n >= rows[0] and rows[-1] >= 0 and rows == sorted(rows, reverse=True)
            assert ratio is not None or rows[0] == n


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [(32, [0, 8, 16, 24]), (3, [0, 1, 2]), (2, [0, 1]), (30, [0, 8, 15, 23]), (10, [0, 3, 5, 8])],
)
def test_stages_begin_with_a_whole_layer(n_layers: int, expected: list[int]) -> None:
    assert first_layers((0.25, 0.5, 0.75), n_layers) == expected
    assert first_layers((0.1, 0.7), 30) == [0, 3, 21], "0.1 x 30 is a little more than 3 in floating point"
