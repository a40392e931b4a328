"""Published methods with more options than fit one line: what the contract is tested with."""

from typing import Any

from baselines import HiPrune, HoloV, LlavaScissor, OTPrune, TopV
from tests.cases import Case

# The cost changes nothing where the mass that leaves a source is its norm (the default); it is refused there.
TOPV_COST: dict[str, Any] = {
    "target": "post_norm",
    "alpha": 0.1,
    "beta": 0.1,
    "gamma": 1.0,
    "sigma": 1.0,
    "eps": 1.0,
}
FREE: dict[str, Any] = {"marginals": "semi_relaxed"}
TOPV_FLIPS: dict[str, Any] = {"budget": 61, "scope": "global", "layer": -2, "recover": 0.5}
TOPV_FLIPS |= {"marginals": "norm_cols_last", "importance": "own"}
TOPV_OWN = {"marginals": "semi_relaxed", "importance": "own", "target": "post_norm"}

METHODS = {
    "topv": Case(TopV, {"budget": 60}, flips={**TOPV_FLIPS, **{k: {k: v, **FREE} for k, v in TOPV_COST.items()}}),
    "topv_own": Case(
        TopV,
        {"budget": 60, **TOPV_OWN},
        flips={**TOPV_FLIPS, **TOPV_COST, "importance": "total", "target": "output"},
    ),
    # Of 12 tokens a view, a tenth is no anchor; a half is one.
    "hiprune": Case(
        HiPrune, {"budget": 60, "alpha": 0.5}, flips={"budget": 61, "alpha": 0.9, "object_layer": -2, "layer": -2}
    ),
    "holov": Case(
        HoloV,
        {"budget": 60},
        flips={
            "budget": 61,
            "scope": "per_view",
            "crops": 9,
            "layer": -2,
            "rank_by": "score",
            # By attention, the cosines can only move a token at the border of two quotas.
            "space": {"space": "encoder", "rank_by": "score"},
        },
    ),
    "llava_scissor": Case(
        LlavaScissor, {"budget": 60}, flips={"budget": 61, "scope": "global", "space": "encoder", "tau": 0.6}
    ),
    "otprune": Case(OTPrune, {"budget": 60}, flips={"budget": 61, "gamma": 5.0, "space": "encoder"}),
}
