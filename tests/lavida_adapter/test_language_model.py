"""The language model: attention calls and masks; every way it runs against a dense computation; recomputation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter import (
    Lavida,
    LladaConfig,
    LoraConfig,
    ObjectiveConfig,
    TrainBatch,
    add_lora,
    language_model,
)
from lavida_adapter.attention import attend, attention_mask
from lavida_adapter.language_model import LanguageModel, Linear, RMSNorm
from lavida_adapter.relevance import LmEmbed
from shirg import ShirgSelector
from tests.lavida_adapter.dense import dense, may_see
from tests.lavida_adapter.tiny import noise, picture, tiny_model

PADDED_KEYS = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
PICTURE_KEYS = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)


def qkv(kv_heads: int, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return noise(2, 4, 6, 8, seed=1), noise(2, kv_heads, keys, 8, seed=2), noise(2, kv_heads, keys, 8, seed=3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, attention_mask(PADDED_KEYS, None), attention_mask(PADDED_KEYS, PICTURE_KEYS)])
def test_sdpa_equals_math(kv_heads: int, mask: Tensor | None) -> None:
    q, k, v = qkv(kv_heads)
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, mask, "math"), rtol=0, atol=1e-5)
    if mask is not None:
        assert torch.equal(attend(q, k, v, mask, "flash"), attend(q, k, v, mask)), "flash-attn takes no mask"


@pytest.mark.parametrize("padding", [None, PADDED_KEYS])
def test_image_first_mask_position_by_position(padding: Tensor | None) -> None:
    mask = attention_mask(padding, PICTURE_KEYS)
    assert mask is not None
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for query in range(6):
            for key in range(6):
                real = padding is None or bool(padding[b, key])
                picture_only = bool(PICTURE_KEYS[b, query])
                expected = query == key or (real and (bool(PICTURE_KEYS[b, key]) or not picture_only))
                assert bool(mask[b, 0, query, key]) == expected, (b, query, key)


P, A, D = 9, 4, 32
VISUAL = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
PADDING = torch.tensor([[1] * 7 + [0] * 2, [1] * 9], dtype=torch.bool)


@pytest.fixture(params=["llada", "dream"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(lm={"family": request.param}).lm


@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_against_a_second_computation(kv_heads: int, family: str) -> None:
    lm = tiny_model(lm={"n_kv_heads": kv_heads, "family": family}).lm
    x = noise(2, P, D)
    everything = torch.ones(P, P, dtype=torch.bool)
    expected = torch.stack([dense(lm, row, everything, torch.arange(P)) for row in x])
    torch.testing.assert_close(lm(x), expected, rtol=0, atol=2e-5)
    lm.backend = "math"
    torch.testing.assert_close(lm(x), expected, rtol=0, atol=2e-5)
    assert lm.prefill(x).n_bytes == 2 * 2 * 2 * P * kv_heads * 8 * 4


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_and_decode_equal_a_dense_prefix_mask(lm: LanguageModel, padded: bool, image_first: bool) -> None:
    """The prefix sees the prefix, the answer sees everything; rows of two lengths."""
    prefix, answer = noise(2, P, D, seed=1), noise(2, A, D, seed=2)
    cache = lm.prefill(prefix, PADDING if padded else None, VISUAL if image_first else None)
    states = lm.decode(answer, cache)
    for b in range(2):
        n = int(PADDING[b].sum()) if padded else P
        row = torch.cat([prefix[b, :n], answer[b]])
        allowed = may_see(n, A, VISUAL[b] if image_first else None, prompt_sees_answer=False)
        expected = dense(lm, row, allowed, torch.arange(n + A))[n:]
        torch.testing.assert_close(states[b], expected, rtol=0, atol=2e-5)
    assert cache.next_position_B.tolist() == ([7, 9] if padded else [9, 9])


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
def test_one_pass_with_padding_equals_rows_alone(lm: LanguageModel, image_first: bool) -> None:
    x = noise(2, P, D)
    states = lm(x, mask_BL=PADDING, visual_BL=VISUAL if image_first else None)
    for b in range(2):
        n = int(PADDING[b].sum())
        allowed = may_see(n, 0, VISUAL[b] if image_first else None, prompt_sees_answer=True)
        torch.testing.assert_close(states[b, :n], dense(lm, x[b, :n], allowed, torch.arange(n)), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
def test_what_stands_in_padding_is_harmless(lm: LanguageModel, image_first: bool) -> None:
    """Enormous numbers in padded slots change no real state by a bit, and no state is NaN."""
    x, visual = noise(2, P, D), VISUAL if image_first else None
    spoiled = x.masked_fill(~PADDING[..., None], 1e4)
    for run in (
        lambda e: lm(e, mask_BL=PADDING, visual_BL=visual),
        lambda e: lm.decode(noise(2, A, D, seed=3), lm.prefill(e, PADDING, visual)),
    ):
        one, other = run(x), run(spoiled)
        assert other.isfinite().all()
        real = PADDING if one.shape[1] == P else torch.ones(2, A, dtype=torch.bool)
        assert torch.equal(one[real], other[real])


@torch.no_grad()
def test_padded_answer_slots_are_not_seen(lm: LanguageModel) -> None:
    cache, answer = lm.prefill(noise(2, P, D)), noise(2, A, D, seed=4)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    states = lm.decode(answer, cache, real)
    short = lm.decode(answer[:1, :2], lm.prefill(noise(2, P, D)[:1]))
    torch.testing.assert_close(states[0, :2], short[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[1], lm.decode(answer, cache)[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_first_keys_and_values_do_not_depend_on_the_question(lm: LanguageModel) -> None:
    """Bit for bit: that is what lets one picture's cache serve many questions. With full attention they do depend."""
    first, second = noise(1, P, D, seed=5), noise(1, P, D, seed=6)
    visual = VISUAL[:1]
    second = torch.where(visual[..., None], first, second)
    for image_first in (True, False):
        one, other = (lm.prefill(x, None, visual if image_first else None) for x in (first, second))
        for layer in range(2):
            same = [
                torch.equal(a[layer][:, :, visual[0]], b[layer][:, :, visual[0]])
                for a, b in ((one.keys, other.keys), (one.values, other.values))
            ]
            assert same == [image_first or layer == 0] * 2
        assert not torch.equal(one.keys[1][:, :, ~visual[0]], other.keys[1][:, :, ~visual[0]])


@torch.no_grad()
def test_hidden_states_on_request(lm: LanguageModel) -> None:
    hidden: list[Tensor] = []
    x = noise(1, P, D)
    states = lm(x, hidden=hidden)
    assert len(hidden) == 3
    assert torch.equal(hidden[0], x)
    assert torch.equal(hidden[-1], states)


@torch.no_grad()
def test_explicit_positions(lm: LanguageModel) -> None:
    """Attention depends on distances alone, so a common shift of all positions changes nothing."""
    x = noise(1, P, D)
    shifted = lm(x, positions_BL=torch.arange(P)[None] + 17)
    torch.testing.assert_close(shifted, lm(x), rtol=0, atol=2e-5)
    assert (lm(x, positions_BL=2 * torch.arange(P)[None]) - lm(x)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_weights_are_drawn_once_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part, with the given deviation; without one they are torch's own."""
    monkeypatch.setattr(language_model, "PART", 1000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        layer = Linear(40, 70, LladaConfig(init_std=0.5), bias=True)
        torch.manual_seed(1)
        own = Linear(40, 70, LladaConfig(init_std=None))
        torch.manual_seed(1)
        assert torch.equal(own.weight, torch.nn.Linear(40, 70, bias=False).weight)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    expected = torch.cat([torch.empty(n).normal_(std=0.5) for n in (1000, 1000, 800)])
    assert layer.weight.dtype == dtype and torch.equal(layer.weight.flatten(), expected.to(dtype))
    assert not layer.bias.any()
    assert layer.weight.float().std().item() == pytest.approx(0.5, rel=0.05)


def test_the_norm_casts_back_before_its_weight() -> None:
    norm = RMSNorm(D, 1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = noise(5, D).to(torch.bfloat16)
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).to(torch.bfloat16) * norm.weight
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected)


LAYERS = "vision_tower.vision_tower.vision_model.encoder.layers"
LORA = LoraConfig(
    rank=3,
    dropout=0.3,
    targets=("mm_projector.0", LAYERS + ".0.self_attn.q_proj", "transformer.blocks.*.{q_proj,v_proj}"),
    train_whole=("image_newline",),
)


def adapted(recompute: bool) -> Lavida:
    with torch.random.fork_rng():
        found = tiny_model()
        torch.manual_seed(0)
        add_lora(found, LORA)
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    found.checkpoint_gradients(recompute)
    return found.train()


def loss(found: Lavida, **objective: Any) -> Tensor:
    batch = TrainBatch([picture((40, 40)), picture((100, 26))], ["digit red", "hm?"], ["7", "blue"], ["a", "b"])
    settings = ObjectiveConfig(extra_padding=0, **objective)
    selector = ShirgSelector(budget=10, scaffold={"size": 2}, newline="row")
    torch.manual_seed(1)  # for dropout
    return found.loss(batch, selector, settings, torch.Generator().manual_seed(0), relevance=LmEmbed())


def saved_bytes(compute: Callable[[], Tensor]) -> int:
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(sizes.values())


@pytest.mark.parametrize("prefix_mask", [False, True])
def test_gradients_are_the_same(prefix_mask: bool) -> None:
    found = []
    for recompute in (False, True):
        model = adapted(recompute)
        value = loss(model, prefix_mask=prefix_mask)
        value.backward()
        found.append((value, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain, gradients), (again, recomputed) = found
    assert torch.equal(plain, again)
    assert len(gradients) == 13 and gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-7)


def test_less_is_kept_and_nothing_without_a_gradient_to_come() -> None:
    assert saved_bytes(lambda: loss(adapted(True))) < 0.7 * saved_bytes(lambda: loss(adapted(False)))
    with torch.no_grad():
        assert saved_bytes(lambda: loss(adapted(True))) == 0
