"""The published config.json: which model it belongs to, and how each language model names its fields there.

docs/lavida.md, "Constants" and "Dream". LLaDA's names are those of `LanguageModelConfig`; Dream's are those of Qwen2.
Other models are refused by name: their tensors could never fit, and a list of them would not say why.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lavida_adapter.lm_config import DreamConfig, FamilyName, LanguageModelConfig, LladaConfig
from shirg import UserError

COMMON: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "add_faster_video": (False,),
    "use_pos_skipping": (False,),
    "tokenizer_padding_side": ("right",),
}
"""Supported values of fields that every family has; no published model uses others."""


@dataclass(frozen=True)
class ConfigLayout:
    """How the config.json of one family is written."""

    title: str
    model_type: str
    architecture: str
    config: type[LladaConfig] | type[DreamConfig]
    supported: Mapping[str, tuple[Any, ...]]
    """Values of features that the published model does not use; other values raise."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our field -> published field, where they differ."""
    drops_token_after_image: bool = False
    """Whether the reference loses the first token after each picture at inference."""

    def name(self, own: str) -> str:
        """The published name of a field of `LanguageModelConfig`."""
        return self.names.get(own, own)


LAYOUTS: Mapping[FamilyName, ConfigLayout] = {
    "llada": ConfigLayout(
        title="LaViDa-LLaDA",
        model_type="llava_llada",
        architecture="LlavaLLaDAModelLM",
        config=LladaConfig,
        supported={
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "activation_type": ("silu",),
            "block_group_size": (1,),
            "alibi": (False,),
            "rope": (True,),
            "rope_full_precision": (True,),
            "attention_layer_norm": (False,),
            "layer_norm_with_affine": (True,),
            "bias_for_layer_norm": (False, None),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "multi_query_attention": (None, False),
            "input_emb_norm": (False,),
            "scale_logits": (False,),
            "weight_tying": (False,),
            "residual_dropout": (0.0,),
            "embedding_dropout": (0.0,),
            **COMMON,
        },
        drops_token_after_image=True,
    ),
    "dream": ConfigLayout(
        title="LaViDa-Dream",
        model_type="llava_dream",
        architecture="LlavaDreamForMaskedDiffusion",
        config=DreamConfig,
        supported={
            "hidden_act": ("silu",),
            "rope_scaling": (None,),
            "tie_word_embeddings": (False,),
            "use_sliding_window": (False, None),
            **COMMON,
        },
        names={
            "d_model": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "n_layers": "num_hidden_layers",
            "mlp_hidden_size": "intermediate_size",
            "max_sequence_length": "max_position_embeddings",
        },
    ),
}
_OTHERS = {
    "llada": "LLaDA, a language model without a vision part",
    "dream": "Dream, a language model without a vision part",
    "llava": "LLaVA, whose language model is autoregressive",
    "qwen2vl": "Qwen2-VL, whose language model is autoregressive",
    "qwen25vl": "Qwen2.5-VL, whose language model is autoregressive",
    "qwen2": "Qwen2, an autoregressive language model without a vision part",
    "llama": "Llama, an autoregressive language model without a vision part",
    "dimple": "Dimple, a diffusion model with the vision tower of Qwen2.5-VL",
    "mmada": "MMaDA, a diffusion model that reads pictures as discrete tokens",
    "siglip": "SigLIP, a vision tower alone, which model.vision_path takes",
}
"""What other models are, by the beginning of their model type or architecture."""


def family_of(raw: Mapping[str, Any]) -> FamilyName:
    """The language model of a LaViDa config.json: from its model type and architecture, else from its field names.

    Raises:
        UserError: the file belongs to another model; the sentence says to which.
    """
    listed = raw.get("architectures")
    given = [raw.get("model_type"), *(listed if isinstance(listed, list) else ())]
    given = [name for name in given if isinstance(name, str) and name.strip("_.- ")]
    names = [re.sub(r"[_.-]", "", name.lower()) for name in given]
    # The names of the fields alone tell LLaDA-V from LaViDa: both have the same model type.
    like_qwen = "hidden_size" in raw and "d_model" not in raw
    if not names:
        return "dream" if like_qwen else "llada"
    if any(name.startswith("lavida") for name in names):  # a copy for other loaders
        return "dream" if like_qwen else "llada"
    has_vision = any(key.startswith("mm_") for key in raw)
    families: tuple[FamilyName, ...] = tuple(LAYOUTS)
    for family in families:
        if any(n.startswith(f"llava{family}") or (has_vision and n.startswith(family)) for n in names):
            if family == "llada" and like_qwen:
                raise _other("LLaDA-V, which has other layers, another picture layout and another way of decoding")
            return family
    known = next((what for name in names for start, what in _OTHERS.items() if name.startswith(start)), None)
    raise _other(known or f"a model of another kind, {given[0][:80]}")


def _other(what: str) -> UserError:
    supported = " or ".join(layout.model_type for layout in LAYOUTS.values())
    return UserError(f"config.json belongs to {what}: give a LaViDa checkpoint (model_type {supported})")


def unsupported(raw: Mapping[str, Any], layout: ConfigLayout) -> list[str]:
    """Descriptions of the language model's entries that have a wrong type, or a value that the family does not have."""
    wrong = [
        f"{name}={raw[name]!r:.80} (supported: {', '.join(map(repr, allowed))})"
        for name, allowed in layout.supported.items()
        if name in raw and raw[name] not in allowed
    ]
    if raw.get("quantization_config") is not None:
        wrong.append("quantization_config (supported: weights that are not quantised)")
    if layout.names:  # what transformers writes for models of Qwen2's kind
        kinds = raw.get("layer_types")
        if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
            wrong.append(f"layer_types={kinds!r:.80} (supported: 'full_attention')")
        width, heads, head_dim = (raw.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
        if head_dim is not None and width is not None and heads:
            whole = all(type(n) is int for n in (width, heads, head_dim))
            if not whole or head_dim * heads != width:
                wrong.append(f"head_dim={head_dim!r:.80} (supported: hidden_size / num_attention_heads)")
    else:
        sizes = {name: raw[name] for name in ("embedding_size", "mlp_ratio") if raw.get(name) is not None}
        wrong += [f"{name}={size!r:.80} (not of type int)" for name, size in sizes.items() if type(size) is not int]
    return wrong + mistyped(layout.config, raw, layout.names)


def read_language_model(raw: Mapping[str, Any], layout: ConfigLayout) -> LanguageModelConfig:
    """The language model's config; absent fields take the published model's values."""
    found = {
        f.name: raw[layout.name(f.name)]
        for f in fields(layout.config)
        if f.name != "family" and (raw.get(layout.name(f.name)) is not None or (f.name == "init_std" and f.name in raw))
    }
    if not layout.names:  # LLaDA names the rows of its embedding `embedding_size` and falls back to `vocab_size`.
        rows = raw.get("embedding_size") or raw.get("vocab_size")
        found |= {} if rows is None else {"vocab_size": rows}
        if "mlp_hidden_size" not in found and "d_model" in found:
            found["mlp_hidden_size"] = found["d_model"] * (raw.get("mlp_ratio") or 4)
    if "n_kv_heads" not in found and "n_heads" in found:
        found["n_kv_heads"] = found["n_heads"]
    return layout.config(**found)


def unlike_published(lm: LanguageModelConfig) -> list[str]:
    """What differs from the published model in a config of its width and depth; such a file is followed all the same.

    Rows, context and the scales of fresh weights are left out: copies have other ones.
    """
    layout = LAYOUTS[lm.family]
    known = layout.config()
    if (lm.d_model, lm.n_layers) != (known.d_model, known.n_layers):
        return []
    free = {"vocab_size", "max_sequence_length", "init_std", "emb_std", "family"}
    pairs = {f.name: (getattr(lm, f.name), getattr(known, f.name)) for f in fields(lm) if f.name not in free}
    return [
        f"{layout.name(own)}={ours} (published {theirs})" for own, (ours, theirs) in pairs.items() if ours != theirs
    ]


def write_language_model(lm: LanguageModelConfig) -> dict[str, Any]:
    """The entries of a published config.json for a language model, the reverse of `read_language_model`."""
    layout = LAYOUTS[lm.family]
    own = {layout.name(f.name): getattr(lm, f.name) for f in fields(lm) if f.name != "family"}
    rows = {} if layout.names else {"embedding_size": lm.vocab_size}
    return {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        **{name: allowed[0] for name, allowed in layout.supported.items()},
        **own,
        **rows,
    }


def with_rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries with the rotary base and scaling as fields of their own; newer files hold both in one."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return raw
    plain = rope.get("rope_type", "default") == "default"
    return {**raw, "rope_theta": rope.get("rope_theta"), "rope_scaling": None if plain else dict(rope)}


def mistyped(cls: type, raw: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[str]:
    """Descriptions of the entries of `raw` whose type differs from that of the default of a dataclass's field.

    `names` maps fields to entries where their names differ.
    """
    kinds: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    pairs = [((names or {}).get(f.name, f.name), type(f.default)) for f in fields(cls)]
    return [
        f"{name}={raw[name]!r:.80} (not of type {kind.__name__})"
        for name, kind in pairs
        if raw.get(name) is not None and kind in kinds and type(raw[name]) not in kinds[kind]
    ]


def pick(cls: type, raw: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of `raw` that name a plain field of the dataclass; null leaves the default where it means nothing."""
    names = {f.name for f in fields(cls)} - set(without)
    return {k: v for k, v in raw.items() if k in names and (v is not None or k == "image_aspect_ratio")}
