"""Combinations of knobs that mean nothing: a knob that would change nothing is a mistake somewhere else."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shirg.gate import ShirgSelector

SINGLE = ("single_672", "single_512")
"""Geometries of one view of the whole picture."""
HAS_GLOBAL = ("lavida_tiles", "fovea")
"""Geometries with a view of the whole picture beside the canvas."""


def refuse_idle_knobs(gate: "ShirgSelector") -> None:
    """Raises ValueError, in one sentence, for knobs that have no effect beside the others."""
    weights, overlaps = gate.weights, gate.geometry == "seed_canvas48"
    has_global = gate.geometry in HAS_GLOBAL
    several = gate.geometry in ("lavida_tiles", "seed_canvas48")
    matched = gate.budget == "matched"
    cases = {
        "crop_term=centre: only geometry=seed_canvas48 has a centre crop; choose none, border or literal": (
            gate.crop_term == "centre" and not overlaps
        ),
        f"crop_term=literal numbers views, and geometry={gate.geometry} has one on its canvas; choose none or border": (
            gate.crop_term == "literal" and not several
        ),
        f"crop_term={gate.crop_term} counts nothing while weights.crop is 0": (
            gate.crop_term != "none" and weights.crop == 0
        ),
        "all weights in use are 0: there is nothing to rank by; raise one of weights.*": (
            not any((weights.similarity, weights.neighbor, weights.centre, weights.variance, weights.edge))
            and gate.crop_term == "none"
        ),
        "variance_of means nothing while weights.variance is 0": (
            gate.variance_of != "channels" and weights.variance == 0
        ),
        "edge_space means nothing while weights.edge is 0": gate.edge_space != "features" and weights.edge == 0,
        "norm_scope means nothing with norm=none; leave it at image": (
            gate.norm == "none" and gate.norm_scope != "image"
        ),
        f"norm_scope=view: geometry={gate.geometry} has no tiles with statistics of their own; choose image": (
            gate.norm_scope == "view" and gate.geometry != "lavida_tiles"
        ),
        f"views=all: geometry={gate.geometry} has no global view beside the canvas; choose tiles": (
            gate.views == "all" and not has_global
        ),
        "underflow=raise is what views=all does anyway where there are too few tokens; choose global or mask": (
            gate.underflow == "raise" and gate.views == "all"
        ),
        f"mask_padding=False: geometry={gate.geometry} fills its view and has no padding; leave it at true": (
            not gate.mask_padding and gate.geometry in SINGLE
        ),
        f"underflow={gate.underflow}: geometry={gate.geometry} has no padding, never too few; leave it at global": (
            gate.underflow != "global" and gate.geometry in SINGLE
        ),
        f"dedup={gate.dedup}: only the crops of geometry=seed_canvas48 share cells; choose relevance": (
            gate.dedup != "relevance" and not overlaps
        ),
        "dedup=mean leaves no doubles to fill up with; choose underflow=mask": (
            gate.dedup == "mean" and gate.underflow != "mask"
        ),
        "dedup=mean and merge.mode=tome both make means; choose one of them": (
            gate.dedup == "mean" and gate.merge.mode != "none"
        ),
        "diversity.mode=mmr cannot promise coverage; choose coverage=0 or diversity.mode=none": (
            gate.diversity.mode != "none" and gate.coverage > 0
        ),
        f"scaffold.source=global: geometry={gate.geometry} has no global view; choose scaffold.source=canvas": (
            gate.scaffold.size != 0 and gate.scaffold.source == "global" and not has_global
        ),
        "underflow=raise needs a budget in numbers; with budget=matched choose global or mask": (
            gate.underflow == "raise" and matched
        ),
        "underflow=raise cannot count the cells of overlapping crops beforehand; choose global or mask": (
            gate.underflow == "raise" and overlaps
        ),
    }
    for sentence, holds in cases.items():
        if holds:
            raise ValueError(sentence)
