"""Straight-through gates: the loss is that of the shortened prefix, the gradient that of a soft membership."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter import Lavida, LmEmbed
from lavida_adapter.encode import PictureEncoder, PicturePrompts
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.loss import answer_losses, rows_alone
from lavida_adapter.straight_through import gated_attention, soft_gates, straight_through_loss
from lavida_adapter.timing import NoTimer
from shirg import ShirgSelector
from tests.lavida_adapter.tiny import noise, tiny_model
from tests.lavida_adapter.training_runs import draw
from tests.refusals import assert_says, message_of

WEIGHTS = {"similarity": 1.0, "neighbour": 0.0, "crop": 0.0}


def trained_head(model: Lavida) -> Learned:
    learned = Learned(base=LmEmbed())
    head = learned.fresh(model, {"hidden": 4})
    with torch.no_grad():
        for i, p in enumerate(head.parameters()):
            p.copy_(0.3 * noise(*p.shape, seed=40 + i) if p.ndim else torch.tensor(0.7))
    return learned


@pytest.mark.parametrize("attention", ["full", "image_first"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_loss_is_that_of_the_tokens_that_are_kept(family: str, attention: Any) -> None:
    model = tiny_model(lm={"family": family}, prefix_attention=attention)
    learned, selector = trained_head(model), ShirgSelector(budget=9, weights=WEIGHTS, scaffold={"size": 2})
    batch = draw(0)
    with torch.no_grad():
        blocks, _ = PictureEncoder(model, selector, learned, NoTimer()).blocks(
            PicturePrompts(batch.images, batch.questions, batch.ids)
        )
        texts, labels = rows_alone(model, batch, least=4)
        expected = answer_losses(model, texts, labels, blocks).mean()
    found = straight_through_loss(model, batch, selector, learned, 0.5, least=4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    for name, p in learned.head.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), name


def test_gates_are_hard_and_their_gradient_is_soft() -> None:
    score = torch.tensor([[2.0, -1.0, 0.5, 9.0]], requires_grad=True)
    competing = torch.tensor([[True, True, True, False]])
    member = torch.tensor([[True, False, False, False]])
    gates = soft_gates(score, competing, member, 0.5)
    assert gates.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    (slope,) = torch.autograd.grad(gates[0, 2], score)
    z = (score.detach()[0, :3] - 0.5) / torch.tensor([1.5, -1.5, 0.0]).square().mean().sqrt()
    soft = ((z[2] - (z[0] + z[2]) / 2) / 0.5).sigmoid()
    assert soft < 0.5 and slope[0, 2] > 0 and slope[0, 3] == 0


def test_attention_with_gates_of_one_is_attention_and_dropped_keys_get_the_derivative_of_seeing_them() -> None:
    q, k, v = (noise(1, 2, 5, 4, seed=s).double() for s in range(3))
    sees = torch.ones(1, 5, 5, dtype=torch.bool)
    ones = torch.ones(1, 5, dtype=torch.float64)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(gated_attention(q, k, v, sees, ones), plain, atol=1e-6)
    dropped = ones.clone()
    dropped[0, 3] = 0
    without = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(dropped > 0)[:, None, None])
    assert torch.allclose(gated_attention(q, k, v, sees, dropped), without, atol=1e-6)

    def total(gate: Tensor) -> Tensor:
        return (gated_attention(q, k, v, sees, gate) * noise(1, 2, 5, 4, seed=9)).sum()

    gate = dropped.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(gate), gate)
    step = torch.zeros_like(dropped)
    step[0, 3] = 1e-3
    assert slope[0, 3].item() == pytest.approx(((total(dropped + step) - total(dropped)) / 1e-3).item(), rel=2e-2)


def test_a_selector_with_tokens_behind_the_kept_ones_is_refused() -> None:
    model = tiny_model()
    learned, batch = trained_head(model), draw(0)
    ends = ShirgSelector(budget=9, weights=WEIGHTS, summary=True)
    call = partial(straight_through_loss, model, batch, ends, learned, 0.5)
    assert_says(message_of(call), "objective=straight_through: ShirgSelector puts other tokens between or behind")
