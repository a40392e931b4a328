"""config.json of Dream, in both directions; and the sentence for every other model."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavida_adapter import DreamConfig, LavidaConfig, LladaConfig
from lavida_adapter.checkpoint import read_config
from lavida_adapter.published_config import LAYOUTS, family_of
from tests.lavida_adapter.tiny import tiny_config

PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaDreamForMaskedDiffusion"],
    "model_type": "llava_dream",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "mask_token_id": 151666,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "mm_hidden_size": 1152,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
}
OTHERS = [
    ({"model_type": "llada", "d_model": 4096}, "LLaDA, a language model without a vision part"),
    ({"architectures": ["LLaDAModelLM"]}, "LLaDA, a language model without a vision part"),
    ({"model_type": "Dream", "architectures": ["DreamModel"]}, "Dream, a language model without a vision part"),
    ({"model_type": "llava_llada", "hidden_size": 4096, "mm_hidden_size": 1152}, "LLaDA-V, which has other layers"),
    ({"model_type": "llava", "text_config": {}}, "LLaVA, whose language model is autoregressive"),
    ({"model_type": "llava_qwen", "mm_hidden_size": 1152}, "LLaVA, whose"),
    ({"architectures": ["LlavaNextForConditionalGeneration"]}, "LLaVA, whose"),
    ({"model_type": "qwen2_vl"}, "Qwen2-VL, whose language model is autoregressive"),
    ({"model_type": "qwen2_5_vl"}, "Qwen2.5-VL, whose"),
    ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "Qwen2-VL, whose"),
    ({"model_type": "qwen2"}, "Qwen2, an autoregressive language model"),
    ({"model_type": "llama"}, "Llama, an autoregressive"),
    ({"model_type": "dimple"}, "Dimple, a diffusion model"),
    ({"model_type": "siglip"}, "SigLIP, a vision tower alone, which model.vision_path takes"),
    ({"model_type": "bert", "architectures": ["BertModel"]}, "a model of another kind, bert"),
]
CHANGES: dict[str, tuple[str, Any]] = {
    "hidden_size": ("d_model", 56 * 28),
    "num_attention_heads": ("n_heads", 56),
    "num_key_value_heads": ("n_kv_heads", 2),
    "num_hidden_layers": ("n_layers", 3),
    "intermediate_size": ("mlp_hidden_size", 77),
    "vocab_size": ("vocab_size", 151667),
    "max_position_embeddings": ("max_sequence_length", 32768),
    "rope_theta": ("rope_theta", 1e4),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
    "eos_token_id": ("eos_token_id", 5),
    "pad_token_id": ("pad_token_id", 6),
    "mask_token_id": ("mask_token_id", 7),
}
"""Published field -> ours, and a value that is not the published one."""


def test_the_published_config_of_dream_is_the_default() -> None:
    config = LavidaConfig.from_dict(PUBLISHED)
    assert config == LavidaConfig(lm=DreamConfig())
    assert config.drop_token_after_image is False and LavidaConfig().drop_token_after_image is True
    assert dict(config.budgets) == {"base": 980, "wide": 1200, "full": 3645}
    assert LavidaConfig.from_dict({"model_type": "llava_dream"}) == config


@pytest.mark.parametrize("name", CHANGES)
def test_other_values_are_obeyed_and_written_back(name: str) -> None:
    own, value = CHANGES[name]
    config = LavidaConfig.from_dict(PUBLISHED | {name: value})
    assert getattr(config.lm, own) == value
    assert config == replace(LavidaConfig(lm=DreamConfig()), lm=replace(DreamConfig(), **{own: value}))
    written = json.loads(json.dumps(config.to_dict()))
    assert written[name] == value
    assert LavidaConfig.from_dict(written) == config


def test_every_size_has_a_published_name() -> None:
    own = {own for own, _ in CHANGES.values()}
    assert own | {"family", "init_std", "emb_std"} == {f.name for f in fields(DreamConfig)}


@pytest.mark.parametrize("raw", [{}, {"architectures": None}, {"d_model": 8, "hidden_size": 8}])
def test_without_a_name_the_fields_decide(raw: dict[str, Any]) -> None:
    assert family_of(raw) == "llada"
    assert family_of({"hidden_size": 64}) == "dream"


@pytest.mark.parametrize("name", ["lavida", "LavidaForConditionalGeneration"])
def test_a_copy_under_lavidas_own_name(name: str) -> None:
    assert family_of({"model_type": name, "d_model": 4096}) == "llada"
    assert family_of({"architectures": [name], "hidden_size": 3584}) == "dream"


@pytest.mark.parametrize("name", ["llava_dream", "LlavaDreamForMaskedDiffusion", "Dream", "DreamModel"])
def test_any_name_of_dream_with_a_vision_part(name: str) -> None:
    assert family_of({"model_type": name, "mm_hidden_size": 1152}) == "dream"
    assert family_of({"architectures": [name], "mm_projector_type": "mlp2x_gelu"}) == "dream"


@pytest.mark.parametrize(("raw", "words"), OTHERS)
def test_other_models_are_refused_by_name(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        LavidaConfig.from_dict(raw)
    sentence = str(error.value)
    assert sentence.startswith(f"config.json belongs to {words}")
    assert sentence.endswith("give a LaViDa checkpoint (model_type llava_llada or llava_dream)")


def test_the_rotary_base_of_newer_files() -> None:
    raw = {k: v for k, v in PUBLISHED.items() if not k.startswith("rope")}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert LavidaConfig.from_dict(raw | {"rope_parameters": rope}).lm.rope_theta == 5e5
    with pytest.raises(ValueError, match="rope_scaling={'rope_type': 'yarn'"):
        LavidaConfig.from_dict(raw | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}})


def test_harmless_values_of_newer_files() -> None:
    more = {
        "head_dim": 128,
        "layer_types": ["full_attention"] * 28,
        "sliding_window": 131072,
        "quantization_config": None,
    }
    assert LavidaConfig.from_dict(PUBLISHED | more) == LavidaConfig.from_dict(PUBLISHED)


def test_key_heads_follow_the_heads() -> None:
    raw = {k: v for k, v in PUBLISHED.items() if k != "num_key_value_heads"}
    assert LavidaConfig.from_dict(raw).lm.n_kv_heads == 28
    assert LavidaConfig.from_dict(PUBLISHED | {"num_key_value_heads": None}).lm.n_kv_heads == 28


@pytest.mark.parametrize("value", ["no", 1, [True]])
def test_whether_a_token_is_dropped_is_yes_or_no(value: Any) -> None:
    for raw in (PUBLISHED, {}):
        with pytest.raises(ValueError, match=r"drop_token_after_image=.* \(not of type bool"):
            LavidaConfig.from_dict(raw | {"drop_token_after_image": value})
    assert LavidaConfig.from_dict(PUBLISHED | {"drop_token_after_image": True}).drop_token_after_image is True


@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 99),
    st.floats(1e-9, 1e9),
    st.one_of(st.none(), st.floats(1e-3, 1.0)),
)
def test_both_directions(family: str, heads: int, groups: int, layers: int, theta: float, std: float | None) -> None:
    kind = {"llada": LladaConfig, "dream": DreamConfig}[family]
    sizes = {"d_model": 4 * heads * groups, "n_heads": heads * groups, "n_kv_heads": heads, "n_layers": layers}
    config = replace(tiny_config(), lm=kind(**sizes, rope_theta=theta, init_std=std))
    assert LavidaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("family", "depth"), [("llada", "n_layers"), ("dream", "num_hidden_layers")])
def test_a_file_unlike_the_published_one_is_followed_and_reported(family: str, depth: str, tmp_path: Path) -> None:
    theta, eps = "rope_theta", "rms_norm_eps"
    raw = LavidaConfig(lm={"llada": LladaConfig, "dream": DreamConfig}[family]()).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with warnings.catch_warnings(action="error"):
        assert read_config(tmp_path).to_dict() == raw
    (tmp_path / "config.json").write_text(json.dumps(raw | {theta: 7e5, eps: 1e-4, "vocab_size": 200000}))
    with pytest.warns(UserWarning, match=f"{theta}=700000.0 .published {raw[theta]}.*{eps}=0.0001") as seen:
        assert read_config(tmp_path).lm.rope_theta == 7e5
    assert len(seen) == 1 and "vocab_size" not in str(seen[0].message)
    (tmp_path / "config.json").write_text(json.dumps(raw | {theta: 7e5, depth: 4}))
    with warnings.catch_warnings(action="error"):
        assert read_config(tmp_path).lm.n_layers == 4
