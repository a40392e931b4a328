"""LoRA: which layers, which gradients, what merging leaves, and ranks that are added during training."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from baselines import Pooled
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora, merge_lora
from lavida_adapter.lora import Growth, RankGrowth, Trained, expand, lora_layers, part_of, rank_growth
from tests.lavida_adapter.tiny import picture, tiny_model
from tests.lavida_adapter.training_runs import QUIET, fit, stage

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
GROWING = LoraConfig(
    rank=8, targets=("mm_projector.{0,2}", "transformer.blocks.*.q_proj"), grow=Growth(start=2, patience=3, gain=0.5)
)
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


def growing() -> tuple[Lavida, RankGrowth]:
    model = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, GROWING)
    growth = rank_growth(GROWING, model)
    assert growth is not None
    return model, growth


def columns(model: Lavida) -> dict[str, Tensor]:
    """The largest number in each column of every B [r]."""
    return {n: layer.lora_B["default"].weight.detach().abs().amax(0) for n, layer in lora_layers(model)}


def adam(model: Lavida, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=weight_decay)


def test_growing_changes_nothing_and_then_the_new_ranks_learn() -> None:
    model, growth = growing()
    optimizer = adam(model, weight_decay=0.1)
    train(model, 3, optimizer)
    assert all(c[:2].min() > 0 and c[2:].max() == 0 for c in columns(model).values())
    before = logits(model)
    growth.best = 1.0
    assert growth.decide(mean=0.9) and growth.rank == 4
    assert torch.equal(logits(model), before)
    train(model, 2, optimizer)
    assert all(c[:4].min() > 0 and c[4:].max() == 0 for c in columns(model).values())
    assert not torch.equal(logits(model), before)


def test_few_ranks_learn_what_a_small_adapter_learns() -> None:
    """The first two of eight are an adapter of rank two with the same A and the same scale."""
    model, _ = growing()
    small = tiny_model()
    add_lora(small, LoraConfig(rank=2, targets=GROWING.targets))
    for (_, big), (_, little) in zip(lora_layers(model), lora_layers(small), strict=True):
        assert big.scaling == little.scaling == {"default": 2.0}
        with torch.no_grad():
            little.lora_A["default"].weight.copy_(big.lora_A["default"].weight[:2])
    for m in (model, small):
        train(m, 3, adam(m))
    torch.testing.assert_close(logits(model), logits(small), rtol=0, atol=1e-5)


def test_when_ranks_are_added() -> None:
    growth = RankGrowth(Growth(start=2, patience=2, gain=0.1), most=6, factors_B=[])
    means = [growth.observe(torch.tensor(x)) for x in (4.0, 2.0, 2.0, 2.0, 3.0, 2.5)]
    assert means == [None, 3.0, None, 2.0, None, 2.75]
    decided = [(growth.decide(mean), growth.rank) for mean in (3.0, 2.0, 1.9, 1.7, 1.6, 1.5)]
    #           the first   better        5 % is not   10.5 % of 1.9 is    not           not: 6 is the most
    assert decided == [(False, 2), (False, 2), (True, 4), (False, 4), (True, 6), (True, 6)]
    assert growth.observe(torch.tensor(1.0)) is None


@QUIET
def test_growth_survives_a_stop(tmp_path: Path) -> None:
    whole, first, second = (stage(GROWING, objective=ObjectiveConfig(extra_padding=0), seed=3) for _ in range(3))
    for module in (whole, first, second):
        module.growth = rank_growth(GROWING, module.model)
    fit(whole, 6)
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)
    fit(first, 4, enable_checkpointing=True, callbacks=[keeper])
    fit(second, 6, resume=tmp_path / "last.ckpt")
    assert whole.growth is not None and second.growth is not None
    assert whole.growth.state_dict() == second.growth.state_dict()
    assert whole.growth.rank > 2
    for (name, a), (_, b) in zip(columns(whole.model).items(), columns(second.model).items(), strict=True):
        assert torch.equal(a, b), name
