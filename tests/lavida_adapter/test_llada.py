"""The language model: a second, dense computation of every way it is run; masks; grouped heads."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.llada import Llada, RMSNorm, rotary_angles, rotate
from tests.lavida_adapter.tiny import noise, tiny_config, tiny_model

P, A, D = 9, 4, 32
VISUAL = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
PADDING = torch.tensor([[1] * 7 + [0] * 2, [1] * 9], dtype=torch.bool)


@pytest.fixture
def lm() -> Llada:
    return tiny_model().lm


@torch.no_grad()
def dense(lm: Llada, embeds: Tensor, may_see: Tensor, positions: Tensor, maps: list[Tensor] | None = None) -> Tensor:
    """The transformer over one row [L, D] with an explicit mask [L, L]; heads and rotation written out.

    `maps` collects the attention [H, L, L] of every layer.
    """
    x, dh = embeds, lm.config.head_dim
    freq = lm.config.rope_theta ** (-torch.arange(0, dh, 2) / dh)
    turn = torch.polar(torch.ones(len(x), dh // 2), positions[:, None] * freq)

    def heads(y: Tensor) -> Tensor:
        return y.view(len(x), -1, dh).transpose(0, 1)

    def spin(y: Tensor) -> Tensor:
        z = torch.complex(y[..., : dh // 2], y[..., dh // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + lm.config.rms_norm_eps).sqrt() * weight

    for block in lm.layers:
        u = norm(x, block.attn_norm.weight)
        q, k, v = spin(heads(block.q_proj(u))), spin(heads(block.k_proj(u))), heads(block.v_proj(u))
        groups = len(q) // len(k)
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) / dh**0.5
        weights = scores.masked_fill(~may_see, -torch.inf).softmax(-1)
        if maps is not None:
            maps.append(weights)
        x = x + block.attn_out((weights @ v.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1))
        u = norm(x, block.ff_norm.weight)
        x = x + block.ff_out(F.silu(block.ff_proj(u)) * block.up_proj(u))
    return norm(x, lm.ln_f.weight)


def may_see(prompt: int, answer: int, visual: Tensor | None, *, prompt_sees_answer: bool) -> Tensor:
    allowed = torch.ones(prompt + answer, prompt + answer, dtype=torch.bool)
    if not prompt_sees_answer:
        allowed[:prompt, prompt:] = False
    if visual is not None:
        picture = F.pad(visual[:prompt], (0, answer))
        allowed[picture] = picture
    return allowed


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_against_a_second_computation(kv_heads: int) -> None:
    lm = tiny_model(lm={"n_kv_heads": kv_heads}).lm
    x = noise(2, P, D)
    everything = torch.ones(P, P, dtype=torch.bool)
    expected = torch.stack([dense(lm, row, everything, torch.arange(P)) for row in x])
    torch.testing.assert_close(lm(x), expected, rtol=0, atol=2e-5)
    lm.backend = "math"
    torch.testing.assert_close(lm(x), expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_and_decode_equal_a_dense_prefix_mask(lm: Llada, padded: bool, image_first: bool) -> None:
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
def test_one_pass_with_padding_equals_rows_alone(lm: Llada, image_first: bool) -> None:
    x = noise(2, P, D)
    states = lm(x, mask_BL=PADDING, visual_BL=VISUAL if image_first else None)
    for b in range(2):
        n = int(PADDING[b].sum())
        allowed = may_see(n, 0, VISUAL[b] if image_first else None, prompt_sees_answer=True)
        torch.testing.assert_close(states[b, :n], dense(lm, x[b, :n], allowed, torch.arange(n)), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
def test_what_stands_in_padding_is_harmless(lm: Llada, image_first: bool) -> None:
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
def test_padded_answer_slots_are_not_seen(lm: Llada) -> None:
    cache, answer = lm.prefill(noise(2, P, D)), noise(2, A, D, seed=4)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    states = lm.decode(answer, cache, real)
    short = lm.decode(answer[:1, :2], lm.prefill(noise(2, P, D)[:1]))
    torch.testing.assert_close(states[0, :2], short[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[1], lm.decode(answer, cache)[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_first_keys_and_values_do_not_depend_on_the_question(lm: Llada) -> None:
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
def test_grouped_heads_equal_repeated_heads() -> None:
    grouped = tiny_model(lm={"n_kv_heads": 2}).lm
    whole = Llada(replace(tiny_config().lm, n_kv_heads=4))
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 8, D).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    x = noise(1, P, D)
    torch.testing.assert_close(grouped(x), whole(x), rtol=0, atol=1e-5)
    assert grouped.prefill(x).n_bytes * 2 == whole.prefill(x).n_bytes


@torch.no_grad()
def test_hidden_states_on_request(lm: Llada) -> None:
    hidden: list[Tensor] = []
    x = noise(1, P, D)
    states = lm(x, hidden=hidden)
    assert len(hidden) == 3
    assert torch.equal(hidden[0], x)
    assert torch.equal(hidden[-1], states)


@torch.no_grad()
def test_explicit_positions(lm: Llada) -> None:
    """Attention depends on distances alone, so a common shift of all positions changes nothing."""
    x = noise(1, P, D)
    shifted = lm(x, positions_BL=torch.arange(P)[None] + 17)
    torch.testing.assert_close(shifted, lm(x), rtol=0, atol=2e-5)
    assert (lm(x, positions_BL=2 * torch.arange(P)[None]) - lm(x)).abs().max() > 1e-2


def test_rotation_keeps_lengths_and_pairs_first_with_second_half() -> None:
    cos, sin = rotary_angles(torch.tensor([[3]]), 8, 10_000.0)
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 2.0
    angle = torch.tensor(3 * 10_000.0 ** (-2 / 8))
    expected = torch.zeros(8)
    expected[1], expected[5] = 2 * angle.cos(), 2 * angle.sin()
    torch.testing.assert_close(rotate(x, cos, sin)[0, 0, 0], expected)
    back = torch.zeros(1, 1, 1, 8)
    back[..., 5] = 2.0
    expected[1], expected[5] = -2 * angle.sin(), 2 * angle.cos()
    torch.testing.assert_close(rotate(back, cos, sin)[0, 0, 0], expected)


def test_the_norm_casts_back_before_its_weight() -> None:
    norm = RMSNorm(D, 1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = noise(5, D).to(torch.bfloat16)
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).to(torch.bfloat16) * norm.weight
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected)
