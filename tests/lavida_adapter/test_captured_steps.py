"""The step that a GPU captures gives the logits of the eager one: one arena, every length, joined weights.

On a CPU the captured function runs without a graph; the tests marked gpu replay graphs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.captured_steps import (
    ROUND,
    ArenaSlots,
    GraphCache,
    Pieces,
    finish,
    finish_prompt,
    project,
    project_prompt,
)
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.families import FAMILIES as PUBLISHED
from lavida_adapter.fused_layers import FusedLayer, join, step_layers
from lavida_adapter.generate import denoise, start
from shirg import UserError
from tests.lavida_adapter.tiny import noise, tiny_model

A, MASK = 6, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
FAMILIES: dict[str, dict[str, Any]] = {
    "llada": {"n_layers": 3, "n_kv_heads": 2},
    "dream": {"family": "dream", "n_layers": 3, "n_kv_heads": 2},
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Lavida:
    return tiny_model(lm=FAMILIES[request.param])


def prefix(n: int = 5, mask: torch.Tensor | None = None, seed: int = 0, batch: int = 2) -> Prefix:
    mask = torch.ones(batch, n, dtype=torch.bool) if mask is None else mask
    return Prefix(noise(batch, n, 32, seed=seed) * mask[..., None], mask, torch.zeros_like(mask))


def prefill(engine: Any, given: Prefix) -> Any:
    return engine.prefill(given.embeds_BPD, given.padding, None, A)


def answers(model: Lavida, batch: int = 2) -> torch.Tensor:
    ids = torch.full((batch, A), model.config.lm.mask_token_id)
    ids[0, 2], ids[-1, :2] = 3, 7
    return ids


@torch.inference_mode()
@pytest.mark.parametrize("knobs", [{}, {"block_length": 3}, {"step_ratio": 0.5, "schedule": "shift"}])
@pytest.mark.parametrize("n_prompt", [5, 64, 70])
def test_the_captured_step_answers_like_single_kernels(model: Lavida, n_prompt: int, knobs: dict[str, Any]) -> None:
    decode, mask_id = DecodeConfig(max_new_tokens=A, **knobs), model.config.lm.mask_token_id
    prompts = [prefix(n_prompt, MASK if n_prompt == 5 else None, seed) for seed in range(2)]
    expected = [model.generate(prompt, decode) for prompt in prompts]
    logits = [DecodeSteps(model.lm, model.prefill(prompt), A)(answers(model)) for prompt in prompts]
    graphs = GraphCache(model.lm)
    for prompt, wanted, eager in zip(prompts, expected, logits, strict=True):
        cache = prefill(graphs, prompt)
        steps = graphs.steps(cache, A)
        torch.testing.assert_close(steps(answers(model)), eager, rtol=0, atol=1e-5)
        blank = start(2, decode, mask_id, ())
        if cache.last_BD is not None:
            blank = model._from_prompt(blank, cache.last_BD, decode)
        sampler = PUBLISHED[model.config.lm.family].sampler
        found, forwards, _, _ = denoise(
            graphs.steps(cache, A), blank, decode, mask_id, sampler=sampler, least_slots=decode.block
        )
        assert torch.equal(found, wanted.ids_BA) and forwards == wanted.forwards
    assert len(graphs._recorded) == (2 if "block_length" in knobs else 1), "one for each shape, whatever the prompt"


@torch.inference_mode()
def test_one_recording_and_one_arena_serve_every_length(model: Lavida) -> None:
    graphs = GraphCache(model.lm)
    for n in (ROUND, 3, 40):
        cache = prefill(graphs, prefix(n))
        assert isinstance(cache.slots, ArenaSlots) and cache.keys[1].data_ptr() == cache.slots.keys[1].data_ptr()
        eager = DecodeSteps(model.lm, model.prefill(prefix(n)), A)(answers(model))
        torch.testing.assert_close(graphs.steps(cache, A)(answers(model)), eager, rtol=0, atol=1e-5)
    assert len(graphs._recorded) == 1 and graphs.arena.n_slots == 2 * ROUND
    first = next(iter(graphs._recorded.values()))
    prefill(graphs, prefix(ROUND + 1))
    assert not graphs._recorded and graphs.arena.n_slots == 4 * ROUND, "they read memory that is gone"
    one = prefill(graphs, prefix(30, batch=1))
    assert graphs.arena.n_slots == 4 * ROUND and one.slots.keys[0].shape[2] == 4 * ROUND
    assert first.slots.keys[0].shape[2] == ROUND


@torch.inference_mode()
def test_a_cache_from_elsewhere_is_copied_and_an_overwritten_one_refused(model: Lavida) -> None:
    graphs, other = GraphCache(model.lm), GraphCache(model.lm)
    ids = answers(model)
    expected = DecodeSteps(model.lm, model.prefill(prefix(9)), A)(ids)
    for cache in (model.prefill(prefix(9)), model.prefill(prefix(9), n_answer=A), prefill(other, prefix(9))):
        steps = graphs.steps(cache, A)
        torch.testing.assert_close(steps(ids), expected, rtol=0, atol=1e-5)
        prefill(graphs, prefix(7, seed=1))
        torch.testing.assert_close(steps(ids), expected, rtol=0, atol=1e-5)
    steps = graphs.steps(prefill(graphs, prefix(9)), A)
    torch.testing.assert_close(steps(ids), expected, rtol=0, atol=1e-5)
    prefill(graphs, prefix(9, seed=1))
    with pytest.raises(UserError, match="overwritten by a later prefill of the same engine"):
        steps(ids)


@torch.inference_mode()
def test_the_weights_are_joined_once_and_follow_changes(model: Lavida) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graphs = GraphCache(model.lm)
    layer, block = graphs._layers[0], model.lm.layers[0]
    assert isinstance(layer, FusedLayer) and layer.qkv.data_ptr() == block.query.weight.data_ptr()
    assert block.up.weight.untyped_storage().data_ptr() == layer.gate_up.untyped_storage().data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = step_layers(model.lm)[0]
    assert isinstance(again, FusedLayer) and again.qkv.data_ptr() == layer.qkv.data_ptr(), "joined already"
    ids, prompt = answers(model), prefix(9)
    steps = graphs.steps(prefill(graphs, prompt), A)
    steps(ids)
    block.up.weight.data += 0.1  # as an adapter is merged: in place
    block.key.weight.data = block.key.weight.data * 1.1  # or as a new tensor
    eager = DecodeSteps(model.lm, model.prefill(prompt), A)(ids)
    torch.testing.assert_close(graphs.steps(prefill(graphs, prompt), A)(ids), eager, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_an_adapter_on_a_projection_is_applied(model: Lavida) -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.5 * super().forward(x)

    gate = model.lm.layers[1].gate
    gate.__class__ = Scaled
    graphs, ids, prompt = GraphCache(model.lm), answers(model), prefix(9)
    assert graphs._layers is model.lm.layers
    eager = DecodeSteps(model.lm, model.prefill(prompt), A)(ids)
    torch.testing.assert_close(graphs.steps(prefill(graphs, prompt), A)(ids), eager, rtol=0, atol=1e-5)


def test_joining_keeps_what_is_one_already() -> None:
    parts = [torch.nn.Parameter(torch.arange(n * 3.0).view(n, 3)) for n in (2, 1, 3)]
    values = torch.cat([p.detach() for p in parts])
    whole = join(parts)
    assert torch.equal(whole, values) and join(parts).data_ptr() == whole.data_ptr()
    assert join(parts[1:]).data_ptr() == parts[1].data_ptr() and torch.equal(join(parts[1:]), values[2:])
    parts[2].data = parts[2].data.clone()
    assert torch.equal(join(parts), values) and join(parts).data_ptr() != whole.data_ptr()


@torch.inference_mode()
def test_one_compilation_serves_all_layers(model: Lavida) -> None:
    """Captured as a compiler captures it, without generating code."""
    graphs = GraphCache(model.lm)
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    graphs._pieces = Pieces(project, finish).compiled(dynamic=False, fullgraph=True, backend=count)
    graphs._prefill_pieces = Pieces(project_prompt, finish_prompt).compiled(fullgraph=True, backend=count)
    graphs._compiled = True
    for n in (9, 40):
        cache = prefill(graphs, prefix(n))
        eager = DecodeSteps(model.lm, model.prefill(prefix(n)), A)(answers(model))
        torch.testing.assert_close(graphs.steps(cache, A)(answers(model)), eager, rtol=0, atol=1e-5)
    assert len(made) == 4, "for prompts and for answers: before and after attention"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_graphs_give_the_same_ids(model: Lavida, engine: Any) -> None:
    model = model.cuda()
    generator = torch.Generator("cuda")
    for knobs in ({}, {"block_length": 3}, {"threshold": 0.5}, {"temperature": 1.0}):
        for n, mask in ((5, None), (5, MASK), (70, None), (6, None)):
            given = prefix(n, mask, seed=n)
            prompt = Prefix(given.embeds_BPD.cuda(), given.mask_BP.cuda(), given.visual_BP.cuda())
            ids = [
                model.generate(
                    prompt, DecodeConfig(max_new_tokens=A, engine=e, **knobs), generator=generator.manual_seed(0)
                ).ids_BA
                for e in ("eager", engine)
            ]
            assert torch.equal(*ids), (knobs, n)
    graphs = model._engines[engine, "cuda"]
    assert isinstance(graphs, GraphCache) and len(graphs._recorded) == 2, "one for each number of wanted slots"


@torch.inference_mode()
def test_released_engines_leave_the_weights_as_they_were(model: Lavida) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    given, whole = prefix(70), model.prefill(prefix(70)).digest()
    model._engines["graph", "cpu"] = GraphCache(model.lm)
    inside = model.lm.layers[0].query.weight
    assert inside.untyped_storage().nbytes() > inside.numel() * 4
    model.release_engines()
    for name, p in model.named_parameters():
        assert p.is_contiguous() and torch.equal(p, before[name]), name
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
    assert model.prefill(given).digest() == whole
    assert not model._engines
