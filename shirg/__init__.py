"""SHIRG: which vision tokens a diffusion vision-language model should keep before its prefix cache is built."""

from shirg.any_vlm import features_from
from shirg.budget import (
    Budget,
    BudgetShare,
    Share,
    least_pooled,
    matched_count_B,
    most_pooled,
    parse_budget,
    picture_counts,
    pooled_count_B,
    unpad_bounds,
)
from shirg.features import Geometry, PictureCounts, Pooling, Role, TokenLayout, VisionFeatures, send
from shirg.layouts import (
    area_weights,
    crops_layout,
    dither,
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
from shirg.similarity import cosine_relevance, saliency
from shirg.validation import MissingFileError, UserError, assert_finite

ShirgGate = ShirgSelector
"""The name for Python: `ShirgGate(budget=80)`."""
# A name of the first edition, which notebooks may import.
tables = layout_tables

__all__ = [
    "Budget",
    "BudgetShare",
    "Geometry",
    "MissingFileError",
    "PictureCounts",
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
    "cosine_relevance",
    "crops_layout",
    "dither",
    "features_from",
    "fovea_layout",
    "gather_tokens",
    "join",
    "keep",
    "layout_tables",
    "least_pooled",
    "matched_count_B",
    "most_pooled",
    "parse_budget",
    "picture_counts",
    "pooled_count_B",
    "regions",
    "saliency",
    "send",
    "single_layout",
    "stable_topk",
    "subdivide",
    "tables",
    "tiles_layout",
    "unpad_bounds",
    "used_rows",
]
