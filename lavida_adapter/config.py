"""The config of a LaViDa checkpoint: the fields of its config.json that change a number.

The published file is flat (the language model's fields beside the `mm_*` fields). Absent fields take the values of
docs/lavida.md, "Constants"; an unsupported value raises.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from lavida_adapter.lm_config import LanguageModelConfig, LladaConfig
from shirg import UserError

PrefixAttention = Literal["full", "image_first"]


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP vision transformer; the defaults are so400m/14 at 384 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    """As in the checkpoint; the last layer is never built (docs/lavida.md, "Vision tower")."""
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def side(self) -> int:
        """Tokens per side of a view; the remaining pixels at the right and bottom are never seen."""
        return self.image_size // self.patch_size


# Features of the LLaDA code base that the published model does not use; other values raise.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
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
    "attention_dropout": (0.0,),
    "residual_dropout": (0.0,),
    "embedding_dropout": (0.0,),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "add_faster_video": (False,),
    "use_pos_skipping": (False,),
    "tokenizer_padding_side": ("right",),
}

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class LavidaConfig:
    """Everything needed to build LaViDa; `from_dict` and `to_dict` read and write the published config.json."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    lm: LanguageModelConfig = field(default_factory=LladaConfig)
    image_aspect_ratio: Literal["anyres", "pad", "resize"] = "anyres"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
    """(width, height) of every canvas, in the order in which they are tried."""
    mm_patch_merge_type: Literal["spatial_unpad", "flat"] = "spatial_unpad"
    mm_spatial_pool_mode: Literal["bilinear", "average", "max"] = "bilinear"
    tokenizer_model_max_length: int = 4096
    prefix_attention: PrefixAttention = "full"
    """"full": picture and question are one bidirectional block; "image_first": picture tokens see the picture alone."""
    drop_token_after_image: bool = True
    """The reference loses the first token after each image at inference; False keeps it (docs/lavida.md, "Prompt")."""
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    budgets: Mapping[str, int] = field(default_factory=dict)
    """Named token budgets. The defaults follow from the largest canvas: "base" is its number of pooled tokens, "full"
    of all tokens, "wide" 60/49 of base rounded up to a multiple of 20 (1,200 for 980)."""
    trained: bool = True
    """False for random weights; tables and reports show it."""

    def __post_init__(self) -> None:
        if self.vision.hidden_size % self.vision.num_attention_heads or self.lm.d_model % (2 * self.lm.n_heads):
            raise UserError("config: the widths must be divisible by the number of heads (and head size must be even)")
        if self.lm.n_heads % self.lm.n_kv_heads:
            raise UserError(f"config: n_heads={self.lm.n_heads} is not a multiple of n_kv_heads={self.lm.n_kv_heads}")
        if self.vision.num_hidden_layers < 2:
            raise UserError("config: the vision tower needs at least 2 layers, because the last one is never built")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"config: {name}={getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        size = self.vision.image_size
        if not self.image_grid_pinpoints:
            raise UserError("config: image_grid_pinpoints is empty; give the (width, height) of at least one canvas")
        for w, h in self.image_grid_pinpoints:
            if w % size or h % size or not w or not h:
                raise UserError(f"config: canvas ({w}, {h}) is not made of whole {size}-pixel views")
        views = 1 + max((w // size) * (h // size) for w, h in self.image_grid_pinpoints)
        views = views if self.image_aspect_ratio == "anyres" else 1
        derived = {"base": views * self.pooled_side**2, "full": views * self.vision.side**2}
        derived["wide"] = min(derived["full"], 20 * math.ceil(derived["base"] * 3 / 49))
        object.__setattr__(self, "budgets", {**derived, **self.budgets})

    @property
    def pooled_side(self) -> int:
        """Tokens per side of a pooled view: half, rounded up for bilinear, down for the window modes."""
        side = self.vision.side
        return -(-side // 2) if self.mm_spatial_pool_mode == "bilinear" else side // 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads a published (flat) config.json; raises one UserError that lists all unsupported values."""
        tower = raw.get("vision_config") or {}
        wrong = [
            f"{name}={raw[name]!r} (supported: {', '.join(map(repr, allowed))})"
            for name, allowed in _ONLY_SUPPORTED.items()
            if name in raw and raw[name] not in allowed
        ]
        wrong += [*_mistyped(LladaConfig, raw), *_mistyped(cls, raw), *_mistyped(VisionConfig, tower)]
        if wrong:
            raise UserError("config.json has values that LaViDa-LLaDA does not support: " + "; ".join(wrong))
        lm = _pick(LladaConfig, raw)
        # LLaDA names the rows of its embedding `embedding_size` and falls back to `vocab_size`.
        lm["vocab_size"] = raw.get("embedding_size") or raw.get("vocab_size", LladaConfig.vocab_size)
        if raw.get("n_kv_heads") is None and "n_heads" in raw:
            lm["n_kv_heads"] = raw["n_heads"]
        if raw.get("mlp_hidden_size") is None and "d_model" in raw:
            lm["mlp_hidden_size"] = raw["d_model"] * raw.get("mlp_ratio", 4)
        own = _pick(cls, raw)
        if "image_aspect_ratio" in own:
            own["image_aspect_ratio"] = own["image_aspect_ratio"] or "resize"
        if "image_grid_pinpoints" in own:
            own["image_grid_pinpoints"] = _canvases(own["image_grid_pinpoints"])
        vision = VisionConfig(**_pick(VisionConfig, tower))
        if raw.get("mm_hidden_size") not in (None, vision.hidden_size):
            raise UserError(
                f"config.json: mm_hidden_size={raw['mm_hidden_size']} but the tower is {vision.hidden_size} wide"
            )
        own |= {"vision": vision, "lm": LladaConfig(**lm)}
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """The published flat layout, plus `vision_config` and this project's own fields."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("vision", "lm")}
        own["image_grid_pinpoints"] = [list(p) for p in self.image_grid_pinpoints]
        own["budgets"] = dict(self.budgets)
        return {
            "architectures": ["LlavaLLaDAModelLM"],
            "model_type": "llava_llada",
            **{name: allowed[0] for name, allowed in _ONLY_SUPPORTED.items()},
            **asdict(self.lm),
            "embedding_size": self.lm.vocab_size,
            "mm_hidden_size": self.vision.hidden_size,
            "vision_config": asdict(self.vision),
            **own,
        }


_CHOICES: dict[str, tuple[str, ...]] = {
    "image_aspect_ratio": ("anyres", "pad", "resize"),
    "mm_patch_merge_type": ("spatial_unpad", "flat"),
    "mm_spatial_pool_mode": ("bilinear", "average", "max"),
    "prefix_attention": ("full", "image_first"),
}


def _canvases(value: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of integers; the file may hold the list as a string."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(w), int(h)) for w, h in pairs)
    except (SyntaxError, TypeError, ValueError):
        raise UserError(f"config.json: image_grid_pinpoints={value!r} is not a list of [width, height]") from None


def _mistyped(cls: type, raw: Mapping[str, Any]) -> list[str]:
    """Descriptions of the entries of `raw` whose type differs from that of the field's default."""
    kinds: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    return [
        f"{f.name}={raw[f.name]!r} (not of type {type(f.default).__name__})"
        for f in fields(cls)
        if raw.get(f.name) is not None and type(f.default) in kinds and type(raw[f.name]) not in kinds[type(f.default)]
    ]


def _pick(cls: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `raw` that name a plain field of the dataclass; null leaves the default where it means nothing."""
    names = {f.name for f in fields(cls)} - {"vision", "lm"}
    return {k: v for k, v in raw.items() if k in names and (v is not None or k in ("image_aspect_ratio", "init_std"))}
