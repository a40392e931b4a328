"""Unequal prompts one behind the other give the cache of a padded batch; which kernel computes their attention."""

from importlib.util import find_spec
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lavida_adapter import DecodeConfig, DreamConfig, Lavida, LladaConfig, Prefix, joined_prompts
from lavida_adapter.attention import Backend, attend
from lavida_adapter.captured_steps import GraphCache
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.joined_prompts import JoinedPrompts, attend_joined, kernel_for_joined, kernels_of
from lavida_adapter.kv_cache import PrefixCache
from tests.lavida_adapter.tiny import noise, tiny_model

A, P, LENGTHS = 4, 9, (7, 9, 1, 4)
MASK = torch.arange(P) < torch.tensor(LENGTHS)[:, None]
PROMPTS = JoinedPrompts.of(LENGTHS, torch.device("cpu"))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 7)


@pytest.fixture(params=[("llada", 4), ("llada", 2), ("dream", 2), ("dream", 1)], ids=str)
def model(request: pytest.FixtureRequest) -> Lavida:
    family, kv_heads = request.param
    return tiny_model(lm={"family": family, "n_kv_heads": kv_heads, "n_layers": 3})


def prefix(mask: Tensor = MASK, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Prefix:
    """Enormous numbers in the padding, which nothing may see."""
    embeds = noise(*mask.shape, 32).masked_fill(~mask[..., None], 1e4)
    visual = torch.arange(P).expand_as(mask) == 2
    return Prefix(embeds.to(device, dtype), mask.to(device), (visual & mask).to(device))


def largest_difference(found: PrefixCache, expected: PrefixCache, mask: Tensor) -> float:
    """Of keys, values and last states, relative to the largest of each; all but the padding."""
    pairs = [*zip(found.keys, expected.keys, strict=True), *zip(found.values, expected.values, strict=True)]
    pairs = [tuple(x * mask[:, None, :, None] for x in pair) for pair in pairs]
    if expected.last_BD is not None:
        assert found.last_BD is not None
        pairs.append((found.last_BD, expected.last_BD))
    return max(float((a - b).float().abs().max() / b.float().abs().max()) for a, b in pairs)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("n_answer", [0, A])
def test_the_cache_is_that_of_a_padded_batch(model: Lavida, backend: Backend, n_answer: int) -> None:
    model.lm.backend = backend
    given = prefix()
    expected = model.lm.prefill(given.embeds_BPD, MASK, n_answer=n_answer)
    for engine in (model._engine("eager"), GraphCache(model.lm)):
        found = engine.prefill(given.embeds_BPD, MASK, None, n_answer, None, LENGTHS)
        assert largest_difference(found, expected, MASK) < 1e-5
        assert [k.shape for k in found.keys] == [k.shape for k in expected.keys]
        assert not any((x * ~MASK[:, None, :, None]).any() for x in (*found.keys, *found.values)), "zeros in padding"
        assert torch.equal(found.positions_BP, expected.positions_BP) and found.mask_BP is MASK
        assert found.next_position_B.tolist() == list(LENGTHS)


@torch.inference_mode()
def test_answers_of_a_batch_are_those_of_its_prompts_alone(model: Lavida) -> None:
    decode = DecodeConfig(max_new_tokens=A)
    together = model.generate(prefix(), decode)
    assert model.batchings == {"joined"}
    for row, n in enumerate(LENGTHS):
        given = prefix()
        alone = Prefix(*(x[row : row + 1, :n] for x in (given.embeds_BPD, given.mask_BP, given.visual_BP)))
        assert torch.equal(model.generate(alone, decode).ids_BA[0], together.ids_BA[row])
    assert model.batchings == {"joined", "equal"}


@torch.inference_mode()
def test_equal_prompts_are_computed_as_before(model: Lavida) -> None:
    given = prefix(torch.ones_like(MASK))
    found = model.prefill(given, A)
    assert found.digest() == model.lm.prefill(given.embeds_BPD, n_answer=A).digest()
    assert model.batchings == {"equal"}


@torch.inference_mode()
def test_what_needs_a_mask_stays_padded() -> None:
    """Picture tokens that see only the picture, hooks, which are shown whole batches, and prompts without a cache."""
    given = prefix()
    image_first, full = tiny_model(prefix_attention="image_first"), tiny_model()
    expected = image_first.lm.prefill(given.embeds_BPD, MASK, given.visual_BP)
    assert image_first.prefill(given).digest() == expected.digest()
    shown = []
    full.prefill(given, 0, lambda q, k, mask: shown.append((q.shape, k.shape, mask is not None)))
    assert shown == [((4, 4, P, 8), (4, 4, P, 8), True)] * 2
    uncached = tiny_model()
    uncached.generate(given, DecodeConfig(max_new_tokens=2, prefix_cache=False))
    assert image_first.batchings == full.batchings == uncached.batchings == {"padded"}


def test_where_tokens_are() -> None:
    found = JoinedPrompts.of((3, 1, 2), CPU)
    assert found.row_T.tolist() == [0, 0, 0, 1, 2, 2] and found.place_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert found.bound_E.tolist() == [0, 3, 4, 6] and found.last_B.tolist() == [2, 3, 5]
    assert found.row_T.dtype == found.place_T.dtype == torch.int64


def heads(n: int, heads: int, seed: int, **like: Any) -> Tensor:
    return noise(1, n, heads, 8, seed=seed).transpose(1, 2).to(**like)


@pytest.mark.parametrize("one_each", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_prompt_by_prompt(kv_heads: int, one_each: bool) -> None:
    total = sum(LENGTHS)
    q = heads(len(LENGTHS) if one_each else total, 4, 1)
    k, v = heads(total, kv_heads, 2), heads(total, kv_heads, 3)
    found = attend_joined(q, k, v, PROMPTS, one_each=one_each)
    assert found.shape == (1, q.shape[2], 4, 8)
    first = 0
    for row, n in enumerate(LENGTHS):
        queries = slice(row, row + 1) if one_each else slice(first, first + n)
        expected = attend(q[:, :, queries], *(x[:, :, first : first + n] for x in (k, v)), None, "math")
        torch.testing.assert_close(found[:, queries], expected.transpose(1, 2), rtol=0, atol=1e-6)
        first += n


def twin(q: Tensor, k: Tensor, v: Tensor, q_bound: Tensor, k_bound: Tensor, q_max: int, k_max: int) -> Tensor:
    """What the flash kernels compute for queries [Q, H, Dh], keys and values [T, G, Dh] and int32 bounds."""
    assert q_bound.dtype == k_bound.dtype == torch.int32
    assert (q_max, k_max) == (int(q_bound.diff().max()), int(k_bound.diff().max()))
    out = torch.empty_like(q)
    for i in range(len(q_bound) - 1):
        rows, keys = slice(*q_bound[i : i + 2].tolist()), slice(*k_bound[i : i + 2].tolist())
        each = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        out[rows] = attend(*each, None, "math")[0].transpose(0, 1)
    return out


@torch.inference_mode()
@pytest.mark.parametrize(("backend", "kernel"), [("sdpa", "varlen_attn"), ("flash", "flash_attn_varlen_func")])
def test_flash_kernels_get_what_they_need(
    model: Lavida, backend: Backend, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layout, bounds and greatest lengths, with a twin in their place."""
    given = prefix()
    expected = model.lm.prefill(given.embeds_BPD, MASK, n_answer=A)
    asked = []
    monkeypatch.setattr(joined_prompts, "_has_varlen", lambda *_: True)
    monkeypatch.setattr(joined_prompts, "_function_of", lambda name: asked.append(name) or twin)
    model.lm.backend = backend
    found = model.lm.prefill_joined(given.embeds_BPD, MASK, LENGTHS, A)
    assert largest_difference(found, expected, MASK) < 1e-5
    assert asked == [kernel] * (2 + model.lm.shift)


def test_torch_takes_these_arguments() -> None:
    """torch's function itself, on tensors without numbers, which it knows how to treat on every machine."""
    bound = torch.empty(5, dtype=torch.int32, device="meta")
    for kv_heads in (1, 2, 4):
        q, k = torch.empty(21, 4, 8, device="meta"), torch.empty(21, kv_heads, 8, device="meta")
        call = joined_prompts._function_of("varlen_attn")
        assert call(q, k, k, bound, bound, 9, 9).shape == (21, 4, 8)
    assert list(signature(varlen_attn).parameters)[:7] == "query key value cu_seq_q cu_seq_k max_q max_k".split()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "is_built", "kernel"),
    [
        (torch.bfloat16, 128, (9, 0), True, "varlen_attn"),
        (torch.float16, 8, (8, 0), True, "varlen_attn"),
        (torch.float32, 128, (9, 0), True, "sdpa"),
        (torch.bfloat16, 12, (9, 0), True, "sdpa"),
        (torch.bfloat16, 264, (9, 0), True, "sdpa"),
        (torch.bfloat16, 128, (7, 5), True, "sdpa"),
        (torch.bfloat16, 128, (9, 0), False, "sdpa"),
    ],
)
def test_the_choice_is_made_before_any_work(
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    is_built: bool,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined_prompts._has_varlen.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: is_built)
    assert kernel_for_joined("sdpa", GPU, dtype, head_dim) == kernel
    assert kernel_for_joined("math", GPU, dtype, head_dim) == "math"
    assert kernel_for_joined("flash", GPU, dtype, head_dim) == "flash_attn_varlen_func"
    assert kernel_for_joined("sdpa", CPU, dtype, head_dim) == "sdpa"
    joined_prompts._has_varlen.cache_clear()


@pytest.mark.parametrize("config", [LladaConfig(), DreamConfig()])
def test_the_kernels_in_words(config: Any) -> None:
    """A CPU has a fused kernel for the heads of both published models; another backend is named as it is."""
    at = CPU, torch.bfloat16, config
    fused = "sdpa (flash_attention)"
    assert (kernels_of("sdpa", *at), kernels_of("math", *at, ["equal"])) == (fused, "math")
    assert kernels_of("sdpa", *at, ["equal", "joined"]) == (
        f"{fused}; steps of unequal prompts: sdpa, mask (flash_attention); "
        "prefills of unequal prompts: sdpa, one by one"
    )
    assert kernels_of("sdpa", *at, ["padded"]).endswith("; padded prompts: sdpa, mask (flash_attention)")


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@CUDA
@torch.inference_mode()
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_device_gives_the_cache_of_a_padded_batch(model: Lavida, dtype: torch.dtype, backend: Backend) -> None:
    """Against float32 on the device, so that both roundings are seen."""
    if backend == "flash" and (dtype == torch.float32 or find_spec("flash_attn") is None):
        pytest.skip("flash-attn is not installed, or does not compute in float32")
    model = model.cuda()
    given = prefix(device="cuda")
    mask = given.mask_BP
    exact = model.lm.prefill(given.embeds_BPD, mask, n_answer=A)
    model, given = model.to(dtype), prefix(device="cuda", dtype=dtype)
    padded = model.lm.prefill(given.embeds_BPD, mask, n_answer=A)
    model.lm.backend = backend
    is_joined = {torch.float32: "sdpa"}.get(dtype, "varlen_attn" if backend == "sdpa" else "flash_attn_varlen_func")
    assert kernel_for_joined(backend, mask.device, dtype, 8) == is_joined
    for engine in (model._engine("eager"), GraphCache(model.lm), GraphCache(model.lm, compiled=True)):
        joined = engine.prefill(given.embeds_BPD, mask, None, A, None, LENGTHS)
        own, theirs = (largest_difference(cache, exact, mask) for cache in (joined, padded))
        assert own < max(1e-4, 1.5 * theirs)


@pytest.mark.gpu
@CUDA
@torch.inference_mode()
@pytest.mark.parametrize("backend", ["sdpa", "flash", "math"])
def test_single_steps_of_unequal_prompts_on_the_device(model: Lavida, backend: Backend) -> None:
    """They run our kernel, whatever the backend but math; flash-attn itself is not needed for them."""
    model = model.cuda()
    given = prefix(device="cuda")
    cache = model.lm.prefill(given.embeds_BPD, given.mask_BP, n_answer=A)
    ids = torch.full((len(LENGTHS), A), model.config.lm.mask_token_id, device="cuda")
    whole = model.lm.logits(model.lm.decode(model.lm.embedding(ids), cache))
    expected = whole[:, [0, 0, 1, 2]] if model.lm.shift else whole
    model.lm.backend = backend
    torch.testing.assert_close(DecodeSteps(model.lm, cache, A)(ids), expected, rtol=0, atol=1e-4)
