"""Taps: extra tensors of a vision tower that a selector asks for by name, and what to do where one is missing.

A name is WHAT, or WHAT@LAYER, where LAYER is an index into the tower's layers (from the end if negative) or a share of
its depth. The features may hold WHAT@*, which serves every layer: then the caller has chosen the layer.
"""

from collections.abc import Set
from dataclasses import dataclass, replace

from shirg.features import VisionFeatures
from shirg.validation import UserError

ANY_LAYER = "*"


@dataclass(frozen=True)
class TapKind:
    """What a tap holds, and how to get it from a vision tower of the transformers library."""

    holds: str
    """What it is, with its shape."""
    record: str
    """What records it."""
    argument: str = ""
    """The argument of `features_from` that takes it; empty where that is `taps`."""


KINDS = {
    "attention": TapKind(
        "the attention that each token receives in its view [B, N]",
        "output_attentions=True and attn_implementation='eager' record the maps that it is the mean of",
        "attention",
    ),
    "keys": TapKind(
        "the attention keys of each token [B, N, heads, width]",
        "a forward hook on the layer's self_attn.k_proj records them",
        "keys",
    ),
    "input": TapKind(
        "the states that enter a layer [B, N, D]", "output_hidden_states=True records them as hidden_states[layer]"
    ),
    "output": TapKind(
        "the states that leave a layer [B, N, D]", "output_hidden_states=True records them as hidden_states[layer + 1]"
    ),
    "post_norm": TapKind(
        "the normed states between attention and MLP [B, N, D]", "a forward hook on the layer's layer_norm2 records it"
    ),
    "encoder": TapKind("the tower's states before the projector [B, N, D]", "the tower's output is this"),
    "pixels": TapKind("the pixels of each token's patch [B, N, 3, P, P]", "unfold cuts pixel_values into patches"),
}


def with_taps(features: VisionFeatures, needs: Set[str], who: str) -> VisionFeatures:
    """The features with every tap of `needs` under its own name; one that serves every layer is found for each.

    Raises:
        UserError: a tap is missing; the message says what it is and how to record it.
    """
    missing = sorted([name for name in needs if name not in features.taps])
    if not missing:
        return features
    found = {name: f"{name.partition('@')[0]}@{ANY_LAYER}" for name in missing if "@" in name}
    for name in missing:
        if found.get(name) not in features.taps:
            raise UserError(_advice(name, who))
    return replace(features, taps={**features.taps, **{name: features.taps[found[name]] for name in missing}})


def _advice(name: str, who: str) -> str:
    """One sentence: which tap is missing, what it is, how to record it, and where to pass it."""
    what, _, layer = name.partition("@")
    where = f", at {layer} of the depth" if "." in layer else f", of layer {layer}" if layer else ""
    kind = KINDS.get(what)
    if kind is None:
        return f"{who} needs the tap '{name}': pass taps={{'{name}': ...}} to features_from, one row per token"
    argument = f"{kind.argument}=" if kind.argument else f"taps={{'{name}': ...}}"
    return (
        f"{who} needs the tap '{name}', {kind.holds}{where}: pass {argument} to features_from; "
        f"in a transformers vision tower {kind.record}"
    )
