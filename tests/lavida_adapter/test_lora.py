"""LoRA: which layers, which gradients, and what merging leaves."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from baselines import Pooled
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora, merge_lora
from lavida_adapter.lora import Trained, expand, part_of
from tests.lavida_adapter.tiny import picture, tiny_model

TOWER = "vision_tower.vision_tower.vision_model.encoder.layers"
TARGETS = (
    "mm_projector.{0,2}",
    TOWER + ".0.self_attn.{q_proj,k_proj}",
    "transformer.blocks.*.{q_proj,ff_out}",
)
CONFIG = LoraConfig(rank=3, targets=TARGETS, train_whole=("image_newline",))
ADAPTED = {
    *("mm_projector.0", "mm_projector.2", f"{TOWER}.0.self_attn.q_proj", f"{TOWER}.0.self_attn.k_proj"),
    *(f"transformer.blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "ff_out")),
}
LAYERS = [f"t.layers.{i}.{leaf}" for i in range(26) for leaf in ("q", "k")]


def adapted(model: Lavida) -> set[str]:
    return {n for n, m in model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def loss(model: Lavida) -> Tensor:
    batch = TrainBatch([picture((40, 40)), picture((100, 26))], ["digit red", "hm?"], ["7", "blue"], ["a", "b"])
    return model.loss(batch, Pooled(), ObjectiveConfig(extra_padding=0), torch.Generator().manual_seed(0))


def train(model: Lavida, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@torch.no_grad()
def logits(model: Lavida) -> Tensor:
    prefix = model.encode([picture((40, 40)), picture((12, 70))], ["digit red", "letter K"], Pooled())
    masks = model.lm.embedding(torch.full((2, 3), model.config.lm.mask_token_id))
    return model.lm.logits(model.lm.decode(masks, model.prefill(prefix)))


def trained_model(config: LoraConfig = CONFIG, steps: int = 3) -> Lavida:
    model = tiny_model()
    add_lora(model, config)
    train(model, steps)
    return model


def test_patterns_of_names() -> None:
    names = ["a.0.x", "a.1.x", "a.10.x", "a.0.y", "b"]
    assert expand("a.*.x", names) == ["a.0.x", "a.1.x", "a.10.x"]
    assert expand("a.{0,10}.{x}", names) == ["a.0.x", "a.10.x"]
    assert expand("a.{0-1}.x", names) == ["a.0.x", "a.1.x"]
    assert expand("b", names) == ["b"]


@pytest.mark.parametrize(
    ("depth", "share", "expected"),
    [(26, "4/26", 4), (26, "8/26", 8), (26, "1/1", 26), (3, "4/26", 1), (3, "8/26", 1), (3, "2/3", 2), (12, "1/5", 3)],
)
def test_a_share_is_the_first_layers_rounded_up(depth: int, share: str, expected: int) -> None:
    assert expand(f"t.layers.{{:{share}}}.{{q,k}}", LAYERS[: 2 * depth]) == LAYERS[: 2 * expected]


def test_parts() -> None:
    names = {
        "mm_projector.0": "mm_projector",
        "model.image_newline": "image_newline",
        "model.model.transformer.blocks.0.ff_out.lora_A.default.weight": "transformer",
        "selector.coords.linear": "selector",
        "vision_tower.vision_tower.vision_model.embeddings": "vision_tower",
    }
    assert {name: part_of(name) for name in names} == names


def test_exactly_the_named_layers_are_adapted() -> None:
    model = tiny_model()
    found = add_lora(model, CONFIG)
    assert adapted(model) == ADAPTED
    assert found == [
        Trained("mm_projector", 3, 2, 3 * (16 + 32 + 32 + 32)),
        Trained("vision_tower", 3, 2, 3 * 2 * (16 + 16)),
        Trained("transformer", 3, 4, 3 * 2 * (32 + 32 + 48 + 32)),
        Trained("image_newline", None, 1, 32),
    ]
    assert str(found[0]) == "mm_projector: 336 parameters (LoRA, rank 3, 2 layers)"
    assert str(found[3]) == "image_newline: 32 parameters (whole, 1 layer)"
    assert sum(f.parameters for f in found) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    lora = {f"model.{n}.lora_{x}.default.weight" for n in ADAPTED for x in "AB"}
    assert training == lora | {"model.image_newline"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("transformer.ff_out", {"transformer.ff_out"}),
        ("transformer.blocks.1.ff_out", {"transformer.blocks.1.ff_out"}),
        ("transformer.blocks.*.ff_out", {"transformer.blocks.0.ff_out", "transformer.blocks.1.ff_out"}),
        ("transformer.blocks.{0-1}.k_proj", {"transformer.blocks.0.k_proj", "transformer.blocks.1.k_proj"}),
    ],
)
def test_the_two_ff_out_are_not_confused(target: str, expected: set[str]) -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=1, targets=(target,)))
    assert adapted(model) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        LoraConfig(rank=2, targets=("mm_projector.0", "mm_projector.1")),
        LoraConfig(rank=2, targets=TARGETS, train_whole=("mm_projector",)),
    ],
)
def test_a_config_that_is_refused_leaves_the_model_without_lora(wrong: LoraConfig) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="mm_projector"):
        add_lora(model, wrong)
    assert adapted(model) == set()


def test_gradients_at_the_first_step_and_after_it() -> None:
    """B starts at zero, so A learns nothing at the first step; afterwards every adapter tensor does; the base never."""
    model = tiny_model()
    add_lora(model, CONFIG)
    loss(model).backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name
        elif "lora_B" in name or name == "model.image_newline":
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    train(model, 1)
    model.zero_grad()
    loss(model).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    base, fresh, trained = tiny_model(), tiny_model(), trained_model()
    add_lora(fresh, CONFIG)
    torch.testing.assert_close(logits(fresh), logits(base), rtol=0, atol=1e-6)
    assert (logits(trained) - logits(base)).abs().max() > 0.05
    assert loss(trained) < loss(base)
    kept = {n.replace(".base_layer", ""): p for n, p in trained.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, kept[n]) for n, p in base.named_parameters() if n != "model.image_newline")


def test_merging_changes_no_answer(tmp_path: Path) -> None:
    trained = trained_model()
    before = logits(trained)
    merge_lora(trained)
    assert adapted(trained) == set()
    torch.testing.assert_close(logits(trained), before, rtol=0, atol=1e-5)
    assert trained.state_dict().keys() == tiny_model().state_dict().keys()
    trained.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(Lavida.from_pretrained(tmp_path / "merged")), before, rtol=0, atol=1e-5)
    add_lora(trained, CONFIG)  # a merged model can be adapted again


@pytest.mark.parametrize("alpha", [None, 3.0, 4.5])
def test_alpha_scales_the_update(alpha: float | None) -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=3, alpha=alpha, targets=("mm_projector.0",)))
    layer: Any = model.model.mm_projector[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * ((6.0 if alpha is None else alpha) / 3)
    base = layer.base_layer.weight.clone()
    merge_lora(model)
    torch.testing.assert_close(model.model.mm_projector[0].weight, base + update)


def test_rank_zero_trains_whole_modules_alone() -> None:
    model = tiny_model()
    found = add_lora(model, LoraConfig(rank=0, targets=TARGETS, train_whole=("image_newline", "mm_projector")))
    assert adapted(model) == set()
    assert {(f.part, f.rank, f.modules) for f in found} == {("image_newline", None, 1), ("mm_projector", None, 2)}
    training = {n.removeprefix("model."): p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(f.parameters for f in found) == sum(training.values())
    assert training.keys() == {"image_newline", *(f"mm_projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias"))}


def test_dropout_is_for_training_alone() -> None:
    model = trained_model(LoraConfig(rank=3, targets=TARGETS, dropout=0.5), 2)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
