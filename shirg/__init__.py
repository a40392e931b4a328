"""SHIRG: which vision tokens a diffusion vision-language model should keep before its prefix cache is built."""

from shirg.gate import ShirgGate
from shirg.geometry import area_weights, subdivide, tables, tiles_layout
from shirg.newline import close_rows, used_rows
from shirg.selection import (
    Budget,
    Pooling,
    Role,
    Selection,
    Selector,
    Source,
    Stage,
    TokenLayout,
    VisionFeatures,
    assert_finite,
    gather_tokens,
    join,
    keep,
    pooled_count_B,
    stable_topk,
    unpad_bounds,
)

__all__ = [
    "Budget",
    "Pooling",
    "Role",
    "Selection",
    "Selector",
    "ShirgGate",
    "Source",
    "Stage",
    "TokenLayout",
    "VisionFeatures",
    "area_weights",
    "assert_finite",
    "close_rows",
    "gather_tokens",
    "join",
    "keep",
    "pooled_count_B",
    "stable_topk",
    "subdivide",
    "tables",
    "tiles_layout",
    "unpad_bounds",
    "used_rows",
]
