"""Compiled prefill and steps: one graph for all lengths, the same answers, and the weights' order in memory."""

from typing import Any

import pytest
import torch
from torch import nn

from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.engine import (
    CompiledEngine,
    CompiledSteps,
    DecodeSteps,
    check_compiler,
    step_logits,
    store_by_column,
)
from tests.lavida_adapter.tiny import noise, tiny_model

A = 6


@pytest.fixture
def model() -> Lavida:
    return tiny_model(lm={"n_layers": 3, "n_kv_heads": 2})


def prefix(n: int, padded: int = 0) -> Prefix:
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, n - padded :] = False
    return Prefix(noise(2, n, 32, seed=n) * mask[..., None], mask, torch.zeros_like(mask))


@torch.inference_mode()
@pytest.mark.parametrize("padded", [0, 3])
def test_one_graph_serves_every_length(model: Lavida, padded: int) -> None:
    """Captured as a compiler captures it, without generating code."""
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    prefill, step = (
        torch.compile(f, fullgraph=True, dynamic=True, backend=count) for f in (model.lm.prefill, step_logits)
    )
    for n, m in ((9, 4), (17, 3), (40, 2)):
        prompt, ids = prefix(n, padded), torch.full((2, A), model.config.lm.mask_token_id)
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
    cache, ids = model.prefill(prefix(9), A), torch.full((2, A), model.config.lm.mask_token_id)
    eager, asked = DecodeSteps(model.lm, cache, A), []

    def step(lm: Any, ids: Any, want: Any, *rest: Any) -> torch.Tensor:
        asked.append(want)
        return step_logits(lm, ids, want, *rest)

    steps = CompiledSteps(DecodeSteps(model.lm, cache, A, step))
    torch.testing.assert_close(steps(ids), eager(ids), rtol=0, atol=1e-6)
    want = torch.tensor([[0, 2], [5, 1]])
    assert torch.equal(steps(ids, want), eager(ids, want))
    assert asked[0].tolist() == [list(range(A))] * 2 and asked[1] is want


def test_weights_are_stored_by_column_and_stay_what_they_are(model: Lavida) -> None:
    prompt = prefix(9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = model.lm(prompt.embeds_BPD)
    with torch.inference_mode():
        store_by_column(model.lm)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for layer in model.lm.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.stride() == (1, layer.out_features)
    states = model.lm(prompt.embeds_BPD)
    torch.testing.assert_close(states, whole, rtol=0, atol=1e-5)
    model.lm.logits(states).sum().backward()  # they can still be trained
    assert model.lm.layers[0].q_proj.weight.grad is not None


def test_other_types_stay_as_they_are() -> None:
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    store_by_column(layer)
    assert layer.weight.stride() == (4, 1)


def test_a_cpu_without_a_compiler_is_told_so(model: Lavida, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    sentence = (
        "needs a C.. compiler on a CPU, and there is no 'no-such-compiler' on the path: install one, name another"
    )
    with pytest.raises(ValueError, match=sentence):
        check_compiler()
    with pytest.raises(ValueError, match=sentence):
        model.generate(prefix(9), DecodeConfig(max_new_tokens=A, engine="compile"))


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"block_length": 3}, {"step_ratio": 0.5, "schedule": "shift"}])
def test_compiled_answers_are_the_same(model: Lavida, knobs: dict[str, Any]) -> None:
    for prompt in (prefix(9), prefix(9, 3), prefix(70)):
        ids = [
            model.generate(prompt, DecodeConfig(max_new_tokens=A, engine=engine, **knobs)).ids_BA
            for engine in ("eager", "compile")
        ]
        assert torch.equal(*ids)
    assert isinstance(model._engines["compile", "cpu"], CompiledEngine)
