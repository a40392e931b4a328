"""SHIRG: which vision tokens a diffusion vision-language model should keep before its prefix cache is built."""

from shirg.budget import Budget, Share, matched_count_B, most_pooled, pooled_count_B, unpad_bounds
from shirg.features import Geometry, Pooling, Role, TokenLayout, VisionFeatures
from shirg.layouts import (
    area_weights,
    crops_layout,
    fovea_layout,
    layout_tables,
    regions,
    single_layout,
    subdivide,
    tiles_layout,
)
from shirg.scaffold import close_rows, used_rows
from shirg.selection import Selection, Selector, Source, Stage, gather_tokens, join, keep, stable_topk
from shirg.shirg import ShirgSelector
from shirg.validation import MissingFileError, UserError, assert_finite

# Names of the first edition, which notebooks may import.
ShirgGate = ShirgSelector
tables = layout_tables

__all__ = [
    "Budget",
    "Geometry",
    "MissingFileError",
    "Pooling",
    "Role",
    "Selection",
    "Selector",
    "Share",
    "ShirgGate",
    "ShirgSelector",
    "Source",
    "Stage",
    "TokenLayout",
    "UserError",
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
    "tables",
    "tiles_layout",
    "unpad_bounds",
    "used_rows",
]
