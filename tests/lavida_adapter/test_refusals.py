"""Wrong use of the model and of its training: each case raises UserError with a sentence that has these words."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from baselines import Pooled
from lavida_adapter import LoraConfig, add_lora
from lavida_adapter.lightning_module import OptimConfig
from lavida_adapter.lora import Growth, check_parts, expand
from shirg import ShirgSelector, UserError
from tests.lavida_adapter.tiny import tiny_model
from tests.lavida_adapter.training_runs import stage

TARGETS = ("mm_projector.{0,2}", "transformer.blocks.*.q_proj")
LAYERS = [f"t.layers.{i}.{leaf}" for i in range(4) for leaf in ("q", "k")]
ONE_LAYER = LoraConfig(rank=3, targets=("mm_projector.0",))

Case = tuple[Callable[[], object], list[str]]


def adapting(target: str) -> Callable[[], object]:
    return lambda: add_lora(tiny_model(), LoraConfig(rank=2, targets=("mm_projector.0", target)))


def whole(*names: str, **options: Any) -> Callable[[], object]:
    return lambda: add_lora(tiny_model(), LoraConfig(rank=0, train_whole=names, **options))


def schedule(**options: Any) -> Callable[[], object]:
    return lambda: OptimConfig(**{"steps": 10, "lr": 1.0} | options)


def rates(**of_parts: float) -> Callable[[], object]:
    return lambda: stage(optim=OptimConfig(steps=4, lr=0.02, rates=of_parts)).configure_optimizers()


def twice_adapted() -> None:
    model = tiny_model()
    for _ in range(2):
        add_lora(model, ONE_LAYER)


def nothing_to_train() -> None:
    module = stage()
    module.model.requires_grad_(False)
    module.configure_optimizers()


COORDS = {"coord_embed": "sincos_linear", "coord_width": 16}
SCHEDULE = ["training needs steps >= 1, lr > 0, 0 <= warmup <= steps and 0 <= lr_floor"]

PATTERNS: dict[str, Case] = {
    "a character of regular expressions": (lambda: expand("a+0.x", ["a.0.x"]), ["'a+0.x' names nothing"]),
    "more than all layers": (
        lambda: expand("t.layers.{:4/3}.q", LAYERS),
        ["the share {:4/3} in 't.layers.{:4/3}.q' is more than all layers"],
    ),
    "an empty range": (lambda: expand("t.layers.{1-0}.q", LAYERS), ["the range {1-0} in 't.layers.{1-0}.q' is empty"]),
    "no such leaf": (
        lambda: expand("t.layers.{:4/26}.v", LAYERS),
        ["'t.layers.0.v' names nothing in this model; the nearest names are t.layers.0."],
    ),
    "no such list of layers": (
        lambda: expand("t.layer.{:4/26}.q", LAYERS),
        ["'t.layer.:4/26.q' names nothing in this model; the nearest names are t.layers"],
    ),
    "a share of nothing": (lambda: expand("t.layers.{:0/26}.q", LAYERS), ["'t.layers.:0/26.q' names nothing"]),
    "a layer too many": (
        lambda: expand("t.layers.{3-4}.q", LAYERS),
        ["'t.layers.4.q' names nothing in this model; the nearest names are t.layers.3.q"],
    ),
    "no such part": (
        lambda: check_parts("lora.ranks", ["selector", "projector"]),
        ["lora.ranks.projector: no such part, the nearest is mm_projector; the parts are"],
    ),
}
LORA: dict[str, Case] = {
    "a layer that is not linear": (
        adapting("mm_projector.1"),
        ["'mm_projector.1' names nothing in this model; the nearest names are mm_projector."],
    ),
    "a name that is near": (adapting("projector.0"), ["lora: 'projector.0' names nothing", "are mm_projector.0"]),
    "a name of the checkpoint": (adapting("model.mm_projector.0"), ["lora: 'model.mm_projector.0' names nothing"]),
    "a range too long": (adapting("transformer.blocks.{0-2}.q_proj"), ["'transformer.blocks.2.q_proj' names nothing"]),
    "one of two": (adapting("transformer.blocks.*.{q_proj,query}"), ["'transformer.blocks.*.query' names nothing"]),
    "an embedding": (adapting("transformer.wte"), ["lora: 'transformer.wte' names nothing"]),
    "a leaf alone": (adapting("q_proj"), ["lora: 'q_proj' names nothing"]),
    "an empty name": (adapting(""), ["lora: '' names nothing"]),
    "a parameter that is not there": (whole("image_newlin"), ["lora: 'image_newlin' names nothing", "image_newline"]),
    "nothing to train": (whole(), ["lora: nothing would be trained"]),
    "targets at rank 0": (whole(targets=TARGETS), ["lora: nothing would be trained"]),
    "trained in two ways": (
        lambda: add_lora(tiny_model(), LoraConfig(rank=2, targets=TARGETS, train_whole=("mm_projector",))),
        ["lora.targets and lora.train_whole both name mm_projector.0, mm_projector.2"],
    ),
    "an adapter on another": (twice_adapted, ["the model has LoRA layers already: merge them"]),
    "a rank below 0": (lambda: LoraConfig(rank=-1), ["lora.rank=-1, lora.dropout=0.0: give a rank >= 0"]),
    "dropout of everything": (
        lambda: LoraConfig(rank=2, targets=TARGETS, dropout=1.0),
        ["lora.dropout=1.0: give a rank >= 0 and a dropout in"],
    ),
    "alpha 0": (lambda: LoraConfig(rank=2, targets=TARGETS, alpha=0.0), ["lora.alpha=0.0: give a positive number"]),
    "no targets": (lambda: LoraConfig(rank=64), ["lora.rank=64 has no lora.targets", "lora.rank=0"]),
    "a rank of what has none": (
        lambda: stage(LoraConfig(rank=3, targets=("mm_projector.0",), ranks={"vision_tower": 2})),
        ["lora.ranks.vision_tower: lora.targets has no layer of it"],
    ),
    "a selector's layer left out": (
        lambda: stage(ONE_LAYER, ShirgSelector(budget=10, **COORDS)),  # type: ignore[arg-type]
        ["would not be trained, selector.coords.linear: add it to lora.targets"],
    ),
    "a layer of another selector": (
        lambda: stage(LoraConfig(rank=3, targets=("selector.coords.linear",)), Pooled()),
        ["lora: 'selector.coords.linear' names nothing in this model"],
    ),
    "growth to where it starts": (
        lambda: LoraConfig(rank=8, targets=TARGETS, grow=Growth(start=8)),
        ["lora.grow.start=8: give a rank below lora.rank=8"],
    ),
    **{
        f"growth with {name}={value}": (
            lambda name=name, value=value: Growth(**{name: value}),
            ["lora.grow=", "give a rank and a number of steps of at least 1"],
        )
        for name, value in (("start", 0), ("patience", 0), ("gain", 1.0), ("gain", -0.1))
    },
}
TRAINING: dict[str, Case] = {
    **{
        f"{name}={value}": (schedule(**{name: value}), SCHEDULE)
        for name, value in (
            ("steps", 0),
            ("lr", 0),
            ("lr", math.nan),
            ("warmup", 11),
            ("warmup", -1),
            ("lr_floor", 1.1),
        )
    },
    "a rate of what is frozen": (
        rates(vision_tower=1e-3),
        ["optim.rates.vision_tower: nothing of it is trained; take it out, or train it"],
    ),
    "a rate of no part": (rates(projector=1e-3), ["optim.rates.projector: no such part, the nearest is mm_projector"]),
    "a rate of 0": (rates(mm_projector=0.0), ["give rates above 0"]),
    "no gradient at all": (nothing_to_train, ["nothing requires a gradient: there is nothing to train"]),
    "float16": (
        lambda: stage(dtype=torch.float16),
        ["dtype=float16 loses small gradients in training: choose dtype=bfloat16"],
    ),
}
CASES = PATTERNS | LORA | TRAINING


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str) -> None:
    wrong, words = CASES[case]
    with pytest.raises(UserError) as error:
        wrong()
    assert [word for word in words if word not in str(error.value)] == []
