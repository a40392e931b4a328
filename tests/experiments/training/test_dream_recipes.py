"""Training configs for Dream: what they train of the published sizes, and that a language model takes its own only."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import build
from experiments.schema import CONF, VERSION_BASE
from experiments.training.plan import FourCharacters, skeleton
from experiments.training.stages import lora_config
from lavida_adapter import add_lora
from lavida_adapter.lora import part_of

D, KV, F, ROWS, LAYERS = 3584, 512, 18944, 151667, 28
W, V, TOWER_LAYERS = 1152, 4304, 26
LM = 2 * ROWS * D + D + LAYERS * (2 * D * D + D + 2 * (KV * D + KV) + 3 * D * F + 2 * D)
TOWER = (
    W * 3 * 14 * 14 + W + 729 * W + TOWER_LAYERS * (4 * (W * W + W) + 4 * W + 2 * W * V + V + W) + 2 * W
)  # patches, positions, layers, the norm that is stored and never applied
TINY = ("model=tiny_scratch", "+model.config.lm.family=dream", "model.config.lm.n_kv_heads=2", "device=cpu")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name="train"):
        return compose("train", list(overrides))


def test_the_published_sizes() -> None:
    model = skeleton(composed("model=lavida_dream", "lora=lm_lora_dream"))
    assert isinstance(model.tokenizer, FourCharacters)
    sizes = {"transformer": LM, "vision_tower": TOWER, "mm_projector": W * D + D + D * D + D, "image_newline": D}
    found = dict.fromkeys(sizes, 0)
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
    assert found == sizes
    assert LM + 2 * (152064 - ROWS) * D == 7_615_616_512  # before the vocabulary is cut
    assert sum(1 for _ in model.model.transformer.parameters()) == 339
    random = skeleton(composed("model=lavida_dream_random", "lora=lm_lora_dream"))
    shapes = {name: (p.shape, p.dtype) for name, p in random.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in model.named_parameters()}


def test_the_control_in_the_language_model() -> None:
    cfg = composed("recipe=lm_lora_dream", "model=lavida_dream")
    model = skeleton(cfg)
    with torch.device("meta"):
        found = add_lora(model, lora_config(cfg))
    assert [(f.part, f.modules, f.parameters) for f in found] == [
        ("transformer", 2 * LAYERS, 28 * LAYERS * (D + D + D + KV))
    ]
    assert round(found[0].parameters / 1e6, 2) == 8.83  # docs/method.md


def test_the_tiny_adapter_takes_every_linear_layer() -> None:
    cfg = composed(*TINY, "lora=tiny_dream")
    model = build.build_model(cfg, torch.device("cpu"))
    found = add_lora(model, lora_config(cfg))
    assert {f.part: f.modules for f in found} == {
        "mm_projector": 2,
        "vision_tower": 2,
        "transformer": 7 * 3,
        "image_newline": 1,
    }


@pytest.mark.parametrize(
    ("model", "lora", "words"),
    [
        (
            TINY,
            "tiny",
            ["transformer.blocks.*.q_proj", "names nothing in this model", "transformer.layers.0."],
        ),
        (
            ("model=tiny_scratch",),
            "tiny_dream",
            ["transformer.layers.*.self_attn.q_proj", "names nothing in this model", "transformer.blocks.0."],
        ),
    ],
)
def test_layers_of_the_other_language_model(model: tuple[str, ...], lora: str, words: list[str]) -> None:
    cfg = composed(*model, f"lora={lora}")
    with pytest.raises(ValueError, match="lora: ") as error:
        add_lora(build.build_model(cfg, torch.device("cpu")), lora_config(cfg))
    assert [word for word in words if word not in str(error.value)] == []
