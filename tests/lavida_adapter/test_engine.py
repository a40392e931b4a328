"""Steps in place give the logits of the differentiable decoder: eager, as graphs, compiled."""

from typing import Any

import pytest
import torch

from experiments.bench import reference
from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.engine import (
    CompiledEngine,
    CompiledSteps,
    DecodeSteps,
    pick,
    step_logits,
)
from tests.lavida_adapter.tiny import noise, tiny_model

A, MASK = 6, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture
def model() -> Lavida:
    return tiny_model(lm={"n_layers": 3, "n_kv_heads": 2})


def prefix(n: int = 5, mask: torch.Tensor | None = None, seed: int = 0) -> Prefix:
    mask = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    return Prefix(noise(2, n, 32, seed=seed) * mask[..., None], mask, torch.zeros_like(mask))


def answers(model: Lavida) -> torch.Tensor:
    ids = torch.full((2, A), model.config.lm.mask_token_id)
    ids[0, 2], ids[1, :2] = 3, 7
    return ids


@torch.inference_mode()
@pytest.mark.parametrize("room", [0, A, A + 1])
@pytest.mark.parametrize("mask", [None, MASK], ids=["equal lengths", "padded"])
def test_steps_equal_the_differentiable_decoder(model: Lavida, mask: torch.Tensor | None, room: int) -> None:
    cache, ids = model.prefill(prefix(mask=mask), n_answer=room), answers(model)
    expected = model.lm.logits(model.lm.decode(model.lm.embedding(ids), cache))
    before, steps = cache.digest(), DecodeSteps(model.lm, cache, A)
    want = torch.tensor([[0, 3, 5], [4, 2, 2]])
    for _ in range(2):  # what the first step leaves behind does not show in the second
        torch.testing.assert_close(steps(ids), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(steps(ids, want), pick(expected, want), rtol=0, atol=1e-5)
        steps(torch.zeros_like(ids))
    assert cache.digest() == before
    assert (steps.reader.slots is cache.slots) == (room == A)


@torch.inference_mode()
@pytest.mark.parametrize("knobs", [{}, {"step_per_block": 4}, {"step_ratio": 0.5, "schedule": "shift"}])
def test_the_plain_twin_gives_the_same_ids(model: Lavida, knobs: dict[str, Any]) -> None:
    """Keys rotated at every step, concatenated, all logits in float64: another way to the same answer."""
    decode, prompt = DecodeConfig(max_new_tokens=12, **knobs), prefix(40)
    twin = reference.plain_generate(model.lm, prompt.embeds_BPD, decode, model.config.lm.mask_token_id)
    assert torch.equal(twin, model.generate(prompt, decode).ids_BA)


def padded(n: int, by: int = 0) -> Prefix:
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, n - by :] = False
    return prefix(n, mask, seed=n)


@torch.inference_mode()
@pytest.mark.parametrize("by", [0, 3])
def test_one_graph_serves_every_length(by: int) -> None:
    """Captured as a compiler captures it, without generating code."""
    model = tiny_model(lm={"n_kv_heads": 2})
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    prefill, step = (
        torch.compile(f, fullgraph=True, dynamic=True, backend=count) for f in (model.lm.prefill, step_logits)
    )
    for n, m in ((9, 4), (17, 3), (40, 2)):
        prompt, ids = padded(n, by), torch.full((2, A), model.config.lm.mask_token_id)
        want = torch.arange(m).expand(2, -1)
        given = (prompt.embeds_BPD, prompt.padding, None, A)
        cache = prefill(*given, None, model.lm.angles(torch.arange(n)[None]))
        expected = model.lm.prefill(*given)
        for found, eager in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
            torch.testing.assert_close(found, eager, rtol=0, atol=1e-5)
        logits = DecodeSteps(model.lm, cache, A, step)(ids, want)
        torch.testing.assert_close(logits, DecodeSteps(model.lm, expected, A)(ids, want), rtol=0, atol=1e-5)
    assert len(graphs) == 2


@torch.inference_mode()
def test_all_slots_are_asked_for_by_number(model: Lavida) -> None:
    cache, ids = model.prefill(padded(9), A), torch.full((2, A), model.config.lm.mask_token_id)
    eager, asked = DecodeSteps(model.lm, cache, A), []

    def step(lm: Any, ids: Any, want: Any, *rest: Any) -> torch.Tensor:
        asked.append(want)
        return step_logits(lm, ids, want, *rest)

    steps = CompiledSteps(DecodeSteps(model.lm, cache, A, step))
    torch.testing.assert_close(steps(ids), eager(ids), rtol=0, atol=1e-6)
    want = torch.tensor([[0, 2], [5, 1]])
    assert torch.equal(steps(ids, want), eager(ids, want))
    assert asked[0].tolist() == [list(range(A))] * 2 and asked[1] is want


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"block_length": 3}, {"step_ratio": 0.5, "schedule": "shift"}])
def test_compiled_answers_are_the_same(knobs: dict[str, Any]) -> None:
    model = tiny_model(lm={"n_layers": 3, "n_heads": 2, "n_kv_heads": 1})  # heads of 16, as the kernel takes
    for prompt in (padded(9), padded(9, 3), padded(70)):
        ids = [
            model.generate(prompt, DecodeConfig(max_new_tokens=A, engine=engine, **knobs)).ids_BA
            for engine in ("eager", "compile")
        ]
        assert torch.equal(*ids)
    assert isinstance(model._engines["compile", "cpu"], CompiledEngine)
