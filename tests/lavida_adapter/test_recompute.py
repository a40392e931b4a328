"""Gradient checkpointing: the same loss and gradients, from less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.relevance import LmEmbed
from shirg import ShirgSelector
from tests.lavida_adapter.tiny import picture, tiny_model

LAYERS = "vision_tower.vision_tower.vision_model.encoder.layers"
LORA = LoraConfig(
    rank=3,
    dropout=0.3,
    targets=("mm_projector.0", LAYERS + ".0.self_attn.q_proj", "transformer.blocks.*.{q_proj,v_proj}"),
    train_whole=("image_newline",),
)


def model(recompute: bool) -> Lavida:
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
        adapted = model(recompute)
        value = loss(adapted, prefix_mask=prefix_mask)
        value.backward()
        found.append((value, {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}))
    (plain, gradients), (again, recomputed) = found
    assert torch.equal(plain, again)
    assert len(gradients) == 13 and gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-7)


def test_less_is_kept_and_nothing_without_a_gradient_to_come() -> None:
    assert saved_bytes(lambda: loss(model(True))) < 0.7 * saved_bytes(lambda: loss(model(False)))
    with torch.no_grad():
        assert saved_bytes(lambda: loss(model(True))) == 0
