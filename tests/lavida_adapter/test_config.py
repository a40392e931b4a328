"""config.json: what is read, derived, refused and written back."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavida_adapter import LavidaConfig, LladaConfig, VisionConfig
from tests.lavida_adapter.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaLLaDAModelLM"],
    "model_type": "llava_llada",
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "include_bias": False,
    "weight_tying": False,
    "attention_dropout": 0.0,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "mask_token_id": 126336,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "mm_hidden_size": 1152,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_use_im_start_end": False,
    "mm_vision_select_layer": -2,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
}


def test_the_published_config_is_the_default() -> None:
    config = LavidaConfig.from_dict(PUBLISHED)
    assert config == LavidaConfig() == LavidaConfig.from_dict({})
    assert dict(config.budgets) == {"base": 980, "wide": 1200, "full": 3645}
    assert (config.vision.side, config.pooled_side, config.lm.head_dim) == (27, 14, 128)


def test_the_tiny_geometry() -> None:
    sizes = yaml.safe_load((ROOT / "conf/model/tiny_scratch.yaml").read_text())["config"]
    config = LavidaConfig(
        vision=VisionConfig(**sizes["vision"]),
        lm=LladaConfig(**sizes["lm"]),
        image_grid_pinpoints=tuple((w, h) for w, h in sizes["image_grid_pinpoints"]),
    )
    assert dict(config.budgets) == {"base": 80, "wide": 100, "full": 320}
    assert (config.vision.side, config.pooled_side) == (8, 4)


@pytest.mark.parametrize(
    ("changes", "base", "full"),
    [
        ({"mm_spatial_pool_mode": "average"}, 5 * 13**2, 3645),
        ({"mm_spatial_pool_mode": "max"}, 845, 3645),
        ({"image_aspect_ratio": "pad"}, 196, 729),
        ({"image_grid_pinpoints": [[384, 768], [1152, 384]]}, 4 * 196, 4 * 729),
        ({"mm_pool": False}, 3645, 3645),
        ({"mm_pool": False, "image_aspect_ratio": None}, 729, 729),
    ],
)
def test_budgets_follow_from_geometry(changes: dict[str, Any], base: int, full: int) -> None:
    budgets = LavidaConfig.from_dict(PUBLISHED | changes).budgets
    assert (budgets["base"], budgets["full"]) == (base, full)


def test_budgets_can_be_named_and_changed() -> None:
    config = LavidaConfig(budgets={"base": 500, "mine": 7})
    assert dict(config.budgets) == {"base": 500, "mine": 7, "wide": 1200, "full": 3645}
    assert LavidaConfig.from_dict(json.loads(json.dumps(config.to_dict()))).budgets == config.budgets


def test_a_switch_takes_the_budgets_of_the_geometry_along_and_leaves_named_ones() -> None:
    """Also where a saved config.json lists all of them."""
    saved = LavidaConfig(budgets={"mine": 7}, image_aspect_ratio="pad").to_dict()
    config = LavidaConfig.from_dict(json.loads(json.dumps(saved)))
    assert dict(config.budgets) == {"base": 196, "wide": 240, "full": 729, "mine": 7}
    unpooled = config.switched(mm_pool=False)
    assert dict(unpooled.budgets) == {"base": 729, "wide": 729, "full": 729, "mine": 7}
    assert unpooled.switched(mm_pool=True) == config.switched() == config
    assert (unpooled.pooled_side, unpooled.pooled(48), config.pooled_side, config.pooled(48)) == (27, 48, 14, 24)


def test_every_field_survives_the_round_trip() -> None:
    """A changed value of each field is in the file, and read back from it."""
    base = tiny_config()
    other: dict[str, Any] = {
        "image_aspect_ratio": "resize",
        "image_grid_pinpoints": ((40, 40),),
        "mm_patch_merge_type": "flat",
        "mm_spatial_pool_mode": "max",
        "mm_pool": False,
        "tokenizer_model_max_length": 77,
        "prefix_attention": "image_first",
        "drop_token_after_image": False,
        "system_prompt": "",
        "budgets": {"base": 3, "wide": 4, "full": 5},
        "trained": True,
        "vision": replace(base.vision, hidden_size=24, hidden_act="gelu"),
        "lm": replace(base.lm, n_kv_heads=2, rope_theta=1e4, init_std=0.1, emb_std=0.5, vocab_size=300),
    }
    assert other.keys() == {f.name for f in fields(LavidaConfig)}
    for name, value in other.items():
        changed = replace(base, **{name: value})
        assert changed != base, name
        assert LavidaConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed, name
    assert LavidaConfig.from_dict(base.to_dict()).lm.init_std is None


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"embedding_size": 126349}, ("lm.vocab_size", 126349)),
        ({"embedding_size": None, "vocab_size": 99}, ("lm.vocab_size", 99)),
        ({"n_kv_heads": None, "n_heads": 16}, ("lm.n_kv_heads", 16)),
        ({"mlp_hidden_size": None}, ("lm.mlp_hidden_size", 4 * 4096)),
        ({"image_aspect_ratio": None}, ("image_aspect_ratio", "resize")),
        ({"image_grid_pinpoints": "[(384, 768), (768, 384)]"}, ("image_grid_pinpoints", ((384, 768), (768, 384)))),
        ({"vision_config": {"num_hidden_layers": 12, "unknown": 3}}, ("vision.num_hidden_layers", 12)),
    ],
)
def test_other_spellings(changes: dict[str, Any], wanted: tuple[str, Any]) -> None:
    found: Any = LavidaConfig.from_dict(PUBLISHED | changes)
    for part in wanted[0].split("."):
        found = getattr(found, part)
    assert found == wanted[1]


def test_one_error_lists_everything_that_is_refused() -> None:
    wrong = {"alibi": True, "weight_tying": True, "mm_projector_type": "linear", "d_model": "4096", "trained": 1}
    with pytest.raises(ValueError) as error:
        LavidaConfig.from_dict(PUBLISHED | wrong)
    for name, value in wrong.items():
        assert f"{name}={value!r}" in str(error.value)
    assert "\n" not in str(error.value)
