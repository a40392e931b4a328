"""The options of SHIRG that the contract is tested with, those of its files and some that no file has; wrappers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from baselines import EvenContext, NormTopK, UniformGrid
from shirg import Selector, ShirgSelector

CONF = Path(__file__).resolve().parent.parent / "conf" / "selector"


@dataclass(frozen=True)
class Case:
    """A selector, the options it is tested with, and for each option a value that must change something.

    A changed value may set other options too: {"norm_scope": {"norm_scope": "view", "norm": "rank"}}. `refused` names
    the options whose changed value has no effect beside the others and must raise.
    """

    build: Callable[..., Selector]
    options: dict[str, Any] = field(default_factory=dict)
    flips: dict[str, Any] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()


SHIRG_FLIPS: dict[str, Any] = {
    "budget": "matched",
    "geometry": "fovea",
    "views": "all",
    "weights": {"weights": {"similarity": 0.1, "neighbour": 0.3, "crop": 0.1}},
    "neighbour": {"neighbour": {"sign": 1}, "weights": {"neighbour": 0.4}},
    "variance_of": {"variance_of": "neighbourhood", "weights": {"variance": 0.5}},
    "edge_space": {"edge_space": "pixels", "weights": {"edge": 0.5}},
    "norm": "rank",
    "norm_scope": "view",
    "mask_padding": False,
    "crop_term": {"crop_term": "border", "weights": {"crop": 0.5}},
    "dedup": "border",
    "coverage": 3,
    "merge": {"merge": {"mode": "tome"}},
    "diversity": {"diversity": {"mode": "mmr"}, "coverage": 0},
    "allocation": {"allocation": {"mode": "evidence_context"}, "coverage": 0, "views": "tiles"},
    "adaptive": {"adaptive": {"mode": "entropy", "temperature": 0.2}},
    "scaffold": {"scaffold": {"size": 2, "source": "canvas"}},
    "summary": True,
    "newline": "row",
    "underflow": {"underflow": "mask", "budget": 150},
    "coord_embed": "sincos_linear",
    "coord_width": 16,
}


EVERY_TERM = {"centre": 0.2, "variance": 0.2, "edge": 0.3, "crop": 0.2}
COORDS = frozenset({"coord_embed", "coord_width"})
"""Each needs the other, and an embedding starts at zero: tests/shirg/test_trainable.py trains one."""
NO_CELL_IS_SHARED = COORDS | {"dedup"}
ONE_VIEW = NO_CELL_IS_SHARED | {"views", "norm_scope", "mask_padding", "underflow"}
TOO_LARGE = {"underflow": {"underflow": "mask", "budget": 300}}


PUBLISHED = {"shirg": 980, "shirg_div": 980, "shirg_672": 1216, "shirg_v2": 769, "shirg_fixed": 768, "shirg_x": 912}
PUBLISHED |= {"shirg_fovea": 980, "shirg_learned": 980}
"""The budget of each variant in the notes."""


def own_options(name: str) -> dict[str, Any]:
    """The options that a variant's file sets."""
    file = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return {option: value for option, value in file.items() if option not in ("defaults", "_target_")}


def variant(name: str, **options: Any) -> ShirgSelector:
    """A variant of SHIRG, at its published budget unless another is given."""
    return ShirgSelector(**{**own_options(name), "budget": PUBLISHED[name], **options})


def preset(name: str, refused: frozenset[str], budget: int = 60, **flips: Any) -> Case:
    """The case of a variant of SHIRG, at a budget of the test."""
    options = {**own_options(name), "budget": budget}
    return Case(ShirgSelector, options, flips={**SHIRG_FLIPS, **flips}, refused=refused)


FAMILY = {
    "shirg": Case(ShirgSelector, {"budget": 60, "scaffold": {"size": 3}}, flips=SHIRG_FLIPS, refused=NO_CELL_IS_SHARED),
    "shirg_div": preset("shirg_div", NO_CELL_IS_SHARED, neighbour={"neighbour": {"sign": -1}}, coverage=5),
    "shirg_672": preset("shirg_672", ONE_VIEW),
    "shirg_v2": preset(
        "shirg_v2",
        NO_CELL_IS_SHARED,
        geometry={"geometry": "fovea", "norm_scope": "image"},
        views="tiles",
        norm_scope="image",
        summary=False,
        **TOO_LARGE,
    ),
    "shirg_fixed": preset("shirg_fixed", ONE_VIEW),
    "shirg_x": preset("shirg_x", ONE_VIEW),
    # As experiment=P2 sets it: for a share of their softmax, and for nothing else here, the scale of scores matters.
    "shirg_learned": Case(
        ShirgSelector,
        {**own_options("shirg_learned"), "budget": 60, "allocation": {"mode": "evidence_context", "mass": 0.5}},
        flips={**SHIRG_FLIPS, "norm": "zscore", "allocation": {"allocation": {"mode": "ranked"}}},
        refused=NO_CELL_IS_SHARED | {"coverage", "views", "norm_scope"},
    ),
    "shirg_fovea": preset("shirg_fovea", NO_CELL_IS_SHARED | {"norm_scope"}, geometry="lavida_tiles"),
}
EVEN_FLIPS = {"selector": UniformGrid(budget=34), "evidence": 5}
OTHERS = {
    "seed_canvas48": Case(
        ShirgSelector,
        {"budget": 60, "geometry": "seed_canvas48", "crop_term": "border", "scaffold": {"size": 2, "source": "canvas"}},
        flips={
            **SHIRG_FLIPS,
            **TOO_LARGE,
            "crop_term": "centre",
            "scaffold": {"scaffold": {"size": 3, "source": "canvas"}},
        },
        refused=COORDS | {"views", "norm_scope"},
    ),
    "cell_means": Case(
        ShirgSelector,
        {"budget": 60, "geometry": "seed_canvas48", "dedup": "mean", "underflow": "mask", "scaffold": {"size": 0}},
        flips={
            **SHIRG_FLIPS,
            "dedup": "relevance",
            "underflow": "global",
            "scaffold": {"scaffold": {"size": 2, "source": "canvas"}},
        },
        refused=COORDS | {"geometry", "views", "norm_scope", "merge", "underflow"},
    ),
    "everything": Case(
        ShirgSelector,
        {
            "budget": 60,
            "views": "all",
            "weights": EVERY_TERM,
            "edge_space": "pixels",
            "crop_term": "literal",
            "merge": {"mode": "tome", "share": 0.2},
            "coverage": 4,
            "scaffold": {"size": 3},
            "summary": True,
        },
        flips={
            **SHIRG_FLIPS,
            **TOO_LARGE,
            "geometry": {"geometry": "fovea", "crop_term": "border"},
            "views": "tiles",
            "weights": {"weights": {**EVERY_TERM, "centre": 0.9}},
            "neighbour": {"neighbour": {"sign": 1}},
            "variance_of": "neighbourhood",
            "edge_space": "features",
            "crop_term": "border",
            "merge": {"merge": {"mode": "none"}},
            "summary": False,
        },
        refused=NO_CELL_IS_SHARED,
    ),
    "mmr": Case(
        ShirgSelector,
        {"budget": 20, "diversity": {"mode": "mmr"}, "scaffold": {"size": 0}},
        flips={**SHIRG_FLIPS, "diversity": {"diversity": {"mode": "none"}}},
        refused=NO_CELL_IS_SHARED | {"coverage"},
    ),
    **{
        f"even_context_{type(inner).__name__}": Case(EvenContext, {"selector": inner}, flips=EVEN_FLIPS)
        for inner in (NormTopK(budget=34), ShirgSelector(budget=34, scaffold={"size": 3}))
    },
}
"""Options of SHIRG that no file has, and selectors around others."""
