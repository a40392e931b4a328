"""Steps in place: the same logits as the differentiable decoder, for every slot or some, from recordings too."""

from typing import Any

import pytest
import torch

from experiments.bench import reference
from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.engine import MAX_GRAPHS, DecodeSteps, GraphCache, ReplayedSteps, pick
from lavida_adapter.generate import denoise, start
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
    expected = model.lm.logits(model.lm.decode(model.lm.wte(ids), cache))
    before, steps = cache.digest(), DecodeSteps(model.lm, cache, A)
    want = torch.tensor([[0, 3, 5], [4, 2, 2]])
    for _ in range(2):  # what the first step leaves behind does not show in the second
        torch.testing.assert_close(steps(ids), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(steps(ids, want), pick(expected, want), rtol=0, atol=1e-5)
        steps(torch.zeros_like(ids))
    assert cache.digest() == before
    assert (steps.reader.slots is cache.slots) == (room == A)


@torch.inference_mode()
@pytest.mark.parametrize("knobs", [{}, {"block_length": 3}, {"step_ratio": 0.5, "schedule": "shift"}])
@pytest.mark.parametrize("n_prompt", [5, 64, 70])
def test_a_recording_answers_like_single_kernels(model: Lavida, n_prompt: int, knobs: dict[str, Any]) -> None:
    """The recorded function, without a recording: what a GPU replays. Buckets, masks and buffers are all there."""
    recorder = GraphCache(model.lm)
    decode = DecodeConfig(max_new_tokens=A, **knobs)
    mask_id = model.config.lm.mask_token_id
    for seed in range(2):
        prompt = prefix(n_prompt, MASK if n_prompt == 5 else None, seed)
        cache, ids = model.prefill(prompt), answers(model)
        logits = ReplayedSteps(recorder, cache)(ids).clone()
        torch.testing.assert_close(logits, DecodeSteps(model.lm, cache, A)(ids), rtol=0, atol=1e-5)
        blank = start(2, decode, mask_id, (), torch.device("cpu"))
        found, forwards, _, _ = denoise(
            ReplayedSteps(recorder, cache), blank, decode, mask_id, least_slots=decode.block
        )
        expected = model.generate(prompt, decode)
        assert torch.equal(found, expected.ids_BA) and forwards == expected.forwards
    assert len(recorder._kept) == (2 if "block_length" in knobs else 1), "one for each shape, whatever the prompt"


@torch.inference_mode()
def test_few_recordings_are_kept(model: Lavida) -> None:
    recorder, ids = GraphCache(model.lm), answers(model)
    for n in range(1, MAX_GRAPHS + 3):
        ReplayedSteps(recorder, model.prefill(prefix(64 * n)))(ids)
    assert [key[3] for key in recorder._kept] == [64 * n for n in range(3, MAX_GRAPHS + 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["graph", "compile"])
@pytest.mark.parametrize("knobs", [{}, {"block_length": 3}, {"threshold": 0.5}, {"temperature": 1.0}])
def test_graphs_give_the_same_ids(model: Lavida, engine: Any, knobs: dict[str, Any]) -> None:
    model = model.cuda()
    for n, mask in ((5, None), (5, MASK), (70, None), (6, None)):
        given = prefix(n, mask, seed=n)
        prompt = Prefix(given.embeds_BPD.cuda(), given.mask_BP.cuda(), given.visual_BP.cuda())
        ids = [
            model.generate(
                prompt,
                DecodeConfig(max_new_tokens=A, engine=e, **knobs),
                generator=torch.Generator("cuda").manual_seed(0),
            ).ids_BA
            for e in ("eager", engine)
        ]
        assert torch.equal(*ids)


def test_graphs_need_a_gpu(model: Lavida) -> None:
    with pytest.raises(ValueError, match="decode.engine=graph replays CUDA graphs: use decode.engine=compile or eager"):
        model.generate(prefix(), DecodeConfig(max_new_tokens=A, engine="graph"))


@torch.inference_mode()
@pytest.mark.parametrize("knobs", [{}, {"step_per_block": 4}, {"step_ratio": 0.5, "schedule": "shift"}])
def test_the_plain_twin_gives_the_same_ids(model: Lavida, knobs: dict[str, Any]) -> None:
    """Keys rotated at every step, concatenated, all logits in float64: another way to the same answer."""
    decode, prompt = DecodeConfig(max_new_tokens=12, **knobs), prefix(40)
    twin = reference.plain_generate(model.lm, prompt.embeds_BPD, decode, model.config.lm.mask_token_id)
    assert torch.equal(twin, model.generate(prompt, decode).ids_BA)
