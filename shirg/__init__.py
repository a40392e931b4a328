"""SHIRG: which vision tokens a diffusion vision-language model should keep before its prefix cache is built."""

from shirg.budget import Budget, matched_count_B, most_pooled, pooled_count_B, unpad_bounds
from shirg.features import Geometry, Pooling, Role, TokenLayout, VisionFeatures
from shirg.gate import ShirgSelector
from shirg.geometry import area_weights, crops_layout, fovea_layout, single_layout, subdivide, tiles_layout
from shirg.newline import close_rows, used_rows
from shirg.selection import Selection, Selector, Source, Stage, assert_finite, gather_tokens, join, keep, stable_topk
from shirg.tables import layout_tables, regions

__all__ = [
    "Budget",
    "Geometry",
    "Pooling",
    "Role",
    "Selection",
    "Selector",
    "ShirgSelector",
    "Source",
    "Stage",
    "TokenLayout",
    "VisionFeatures",
    "area_weights",
    "assert_finite",
    "close_rows",
    "crops_layout",
    "fovea_layout",
    "gather_tokens",
    "join",
    "keep",
    "layout_tables",
    "matched_count_B",
    "most_pooled",
    "pooled_count_B",
    "regions",
    "single_layout",
    "stable_topk",
    "subdivide",
    "tiles_layout",
    "unpad_bounds",
    "used_rows",
]
