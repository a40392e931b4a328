"""The config of a LaViDa checkpoint: the fields of its config.json that change a number.

The published file is flat (the language model's fields beside the `mm_*` fields). Absent fields take the values of
docs/lavida.md, "Constants"; an unsupported value raises.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

from lavida_adapter.lm_config import LanguageModelConfig, LladaConfig
from lavida_adapter.published_config import (
    LAYOUTS,
    family_of,
    mistyped,
    pick,
    read_language_model,
    unsupported,
    with_rope,
    write_language_model,
)
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
    mm_pool: bool = True
    """Whether views are pooled. A published config.json does not say it, and the low-resolution checkpoint does not."""
    tokenizer_model_max_length: int = 4096
    prefix_attention: PrefixAttention = "full"
    """"full": picture and question are one bidirectional block; "image_first": picture tokens see the picture alone."""
    drop_token_after_image: bool | None = None
    """The reference of LLaDA loses the first token after each picture at inference (True), that of Dream keeps it
    (False); None: as the family's reference (docs/lavida.md, "Prompt")."""
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    budgets: Mapping[str, int] = field(default_factory=dict)
    """Named token budgets. The defaults follow from the largest canvas: "base" is its number of pooled tokens, "full"
    of all tokens (the same without pooling), "wide" 60/49 of base rounded up to a multiple of 20 (1,200 for 980)."""
    trained: bool = True
    """False for random weights; tables and reports show it."""

    def __post_init__(self) -> None:
        if len(self.system_prompt) > MOST_TEXT:
            n = len(self.system_prompt)
            raise UserError(f"config: system_prompt has {n:,} characters: give at most {MOST_TEXT:,}")
        _check_sizes(self.vision)
        _check_sizes(self.lm)
        if max(self.vision.num_hidden_layers, self.lm.n_layers) > MOST_LAYERS:
            raise UserError(f"config: a model of more than {MOST_LAYERS:,} layers cannot be built; check n_layers")
        if not 0 < self.tokenizer_model_max_length:
            raise UserError(f"config: tokenizer_model_max_length={self.tokenizer_model_max_length} must be positive")
        if self.vision.hidden_size % self.vision.num_attention_heads or self.lm.d_model % (2 * self.lm.n_heads):
            raise UserError("config: the widths must be divisible by the number of heads (and head size must be even)")
        if self.lm.n_heads % self.lm.n_kv_heads:
            raise UserError(f"config: n_heads={self.lm.n_heads} is not a multiple of n_kv_heads={self.lm.n_kv_heads}")
        if self.vision.num_hidden_layers < 2:
            raise UserError("config: the vision tower needs at least 2 layers, because the last one is never built")
        if self.drop_token_after_image is None:
            object.__setattr__(self, "drop_token_after_image", LAYOUTS[self.lm.family].drops_token_after_image)
        self._check_choices()
        self._check_canvases()
        _check_budgets(self.budgets)
        object.__setattr__(self, "budgets", {**self._derived_budgets(), **self.budgets})

    def _check_canvases(self) -> None:
        size = self.vision.image_size
        if not self.pooled_side:
            raise UserError(f"config: a view of {size} pixels has no token with patch_size={self.vision.patch_size}")
        if not self.image_grid_pinpoints:
            raise UserError("config: image_grid_pinpoints is empty; give the (width, height) of at least one canvas")
        for w, h in self.image_grid_pinpoints:
            if w % size or h % size or w <= 0 or h <= 0:
                raise UserError(f"config: canvas ({w}, {h}) is not made of whole {size}-pixel views")
            if (w // size) * (h // size) > MOST_VIEWS:
                raise UserError(f"config: canvas ({w}, {h}) has more than {MOST_VIEWS} views of {size} pixels")

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"config: {name}={getattr(self, name)!r:.80}; choose one of {', '.join(allowed)}")
        if self.vision.hidden_act not in _ACTIVATIONS:
            given = f"vision_config.hidden_act={self.vision.hidden_act!r:.80}"
            raise UserError(f"config: {given}; choose one of {', '.join(_ACTIVATIONS)}")
        for name in ("mm_pool", "drop_token_after_image", "trained"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"config: {name}={getattr(self, name)!r}; give true or false")

    def _derived_budgets(self) -> dict[str, int]:
        size = self.vision.image_size
        views = 1 + max((w // size) * (h // size) for w, h in self.image_grid_pinpoints)
        views = views if self.image_aspect_ratio == "anyres" else 1
        base, full = views * self.pooled_side**2, views * self.vision.side**2
        return {"base": base, "full": full, "wide": min(full, 20 * math.ceil(base * 3 / 49))}

    @property
    def pooled_side(self) -> int:
        """Tokens per side that LaViDa feeds of one of its own views."""
        return self.pooled(self.vision.side)

    def pooled(self, side: int) -> int:
        """Tokens per side that pooling leaves of a view of side x side: half, rounded up for bilinear, down for the
        window modes; all of them where views are not pooled."""
        if not self.mm_pool:
            return side
        return -(-side // 2) if self.mm_spatial_pool_mode == "bilinear" else side // 2

    def switched(self, **changes: Any) -> Self:
        """The config with other values of some fields. Budgets that follow from the geometry follow the new one."""
        derived = self._derived_budgets()
        named = {name: count for name, count in self.budgets.items() if derived.get(name) != count}
        return replace(self, budgets=named, **changes)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads a published (flat) config.json of either family.

        Raises:
            UserError: another model's file; or unsupported values, all of them in one error.
        """
        layout = LAYOUTS[family_of(raw)]
        raw = with_rope(raw)
        tower = raw.get("vision_config") or {}
        wrong = unsupported(raw, layout)
        wrong += mistyped(cls, raw)
        wrong += mistyped(VisionConfig, tower) if isinstance(tower, Mapping) else [f"vision_config={tower!r}"]
        if not isinstance(raw.get("drop_token_after_image"), bool | None):
            wrong.append(f"drop_token_after_image={raw['drop_token_after_image']!r} (not of type bool)")
        if wrong:
            raise UserError(f"config.json has values that {layout.title} does not support: " + "; ".join(wrong))
        own = pick(cls, raw, without=("vision", "lm"))
        if "image_aspect_ratio" in own:
            own["image_aspect_ratio"] = own["image_aspect_ratio"] or "resize"
        if "image_grid_pinpoints" in own:
            own["image_grid_pinpoints"] = _canvases(own["image_grid_pinpoints"])
        vision = VisionConfig(**pick(VisionConfig, tower))
        if raw.get("mm_hidden_size") not in (None, vision.hidden_size):
            raise UserError(
                f"config.json: mm_hidden_size={raw['mm_hidden_size']} but the tower is {vision.hidden_size} wide"
            )
        own |= {"vision": vision, "lm": read_language_model(raw, layout)}
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """The published flat layout, plus `vision_config` and this project's own fields."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("vision", "lm")}
        own["image_grid_pinpoints"] = [list(p) for p in self.image_grid_pinpoints]
        own["budgets"] = dict(self.budgets)
        return {
            **write_language_model(self.lm),
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


_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "gelu_new", "quick_gelu")
MOST_LAYERS, MOST_VIEWS, MOST_WIDE, MOST, MOST_TEXT = 1000, 400, 2**24, 2**40, 100_000
"""No model has more; a file that says so would be built, or would cut pictures, until memory is full. Widths and rows
are bounded closer, so that the numbers of a matrix can be counted in 64 bits."""
_MOST_OF = {"image_size": 2**14, "patch_size": 2**14, "max_sequence_length": MOST, "rope_theta": MOST}


def _check_sizes(part: VisionConfig | LanguageModelConfig) -> None:
    sizes = {f.name: getattr(part, f.name) for f in fields(part) if not f.name.endswith("_id")}
    for name, n in sizes.items():
        most = _MOST_OF.get(name, MOST_WIDE)
        if isinstance(n, int | float) and not 0 < n <= most:
            kind = type(part).__name__
            raise UserError(f"config: {name}={n:.6g}: it must be positive and at most {most:,} ({kind})")


def _check_budgets(budgets: object) -> None:
    whole = isinstance(budgets, Mapping) and all(type(n) is int and 0 < n < MOST for n in budgets.values())
    if not whole:
        raise UserError(f"config: budgets={budgets!r:.80}; give names and positive numbers of tokens")


def _canvases(value: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of integers; the file may hold the list as a string."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(w), int(h)) for w, h in pairs)
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError):
        raise UserError(f"config.json: image_grid_pinpoints={value!r:.80} is not a list of [width, height]") from None
