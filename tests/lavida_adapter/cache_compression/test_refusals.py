"""Cache methods that cannot work: each case raises UserError with a sentence that has these words."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lavida_adapter import (
    DART,
    AdaptiveK,
    CacheSelector,
    Cast,
    FastV,
    Int8,
    LayerRetention,
    Prefix,
    PyramidDrop,
    RedVTP,
    SparseVLM,
)
from shirg import MissingFileError, UserError
from tests.lavida_adapter.cache_compression.prompts import DECODE, made_prefix, small

Case = tuple[Callable[[], object], list[str]]


def generating(prefix: Prefix | None = None, options: Any = None, **methods: Any) -> Callable[[], object]:
    """Answers to two made prompts of seven and five picture rows, with three layers."""
    return lambda: small().generate(prefix or made_prefix(), replace(DECODE, **(options or {})), **methods)


def shortening(selector: CacheSelector) -> Callable[[], object]:
    """The cache method without a first step."""
    model, prefix = small(), made_prefix()
    return lambda: selector(model.lm, model.prefill(prefix), prefix)


def unscored() -> Prefix:
    prefix = made_prefix()
    return replace(prefix, selections=tuple(replace(s, scores_BN=None) for s in prefix.selections))


def unasked() -> Prefix:
    """The second prompt ends with its picture."""
    prefix = made_prefix()
    mask_BP = prefix.mask_BP.clone()
    mask_BP[1, 8:] = False
    return replace(prefix, mask_BP=mask_BP)


CASES: dict[str, Case] = {
    **{
        f"budget {b}": (lambda b=b: FastV(budget=b), [f"budget={b!r}: give a positive number of tokens or 'matched'"])
        for b in (0, True, None)
    },
    "positions": (lambda: FastV(budget=2, positions="shift"), ["positions='shift': choose retain or reindex"]),  # type: ignore[arg-type]
    "a layer below 0": (lambda: FastV(budget=2, layer=-1), ["layer=-1: give the number of a layer"]),
    "queries": (lambda: FastV(budget=2, queries="all"), ["queries='all': choose last or text"]),  # type: ignore[arg-type]
    "a layer too many": (
        generating(cache_selector=FastV(budget=2, layer=3)),
        ["layer=3: the language model has layers 0 to 2"],
    ),
    "a budget above the picture": (
        generating(cache_selector=FastV(budget=6)),
        ["FastV: budget 6 is larger than the 5 picture tokens in the prefix of prompt 1"],
    ),
    "no cache to shorten": (
        generating(options={"prefix_cache": False}, cache_selector=FastV(budget=2)),
        ["FastV shortens the prefix cache, and decode.prefix_cache=false has none: choose cache=none"],
    ),
    **{
        f"no later step, {name}": (
            generating(options=options, cache_selector=RedVTP(budget=2)),
            [
                "RedVTP decides after the first denoising step, and the answer to prompt 0 of the batch takes only one",
                "choose a longer answer (decode.max_new_tokens), more steps, another decode.schedule or cache=none",
            ],
        )
        for name, options in {
            "one in all": {"step_per_block": 1},
            "a threshold for one token": {"max_new_tokens": 1, "threshold": 0.5},
            "drawn for one token": {"max_new_tokens": 1, "remasking": "origin"},
            "one that fills something": {"max_new_tokens": 2, "schedule": "time_grid"},
        }.items()
    },
    "no later step for one draft": (
        generating(cache_selector=AdaptiveK(budget=4), drafts=[[], [5, 6, 7]]),
        ["AdaptiveK decides after the first denoising step, and the answer to prompt 1 of the batch takes only one"],
    ),
    **{
        f"no step at all, {type(method).__name__}": (
            generating(drafts=[[], [5, 6, 7, 8]], **{kind: method}),
            [f"{type(method).__name__} is for the denoising steps, and the answer to prompt 1 of the batch takes none"],
        )
        for kind, method in (
            ("cache_selector", FastV(budget=2)),
            ("cache_selector", RedVTP(budget=2)),
            ("cache_packer", Int8()),
        )
    },
    "first steps at different times": (
        generating(options={"block_length": 1}, cache_selector=RedVTP(budget=2), drafts=[[5], []]),
        [
            "RedVTP decides after the first denoising step, which comes at different times for prompt 0 of the batch",
            "and prompt 1 of the batch because of their drafts: answer one prompt at a time (batch_size=1)",
        ],
    ),
    "matched to nothing": (
        generating(replace(made_prefix(), n_matched=()), cache_selector=FastV(budget="matched")),
        ["FastV: budget=matched needs a prefix made by encode"],
    ),
    "RedVTP at once": (shortening(RedVTP(budget=2)), ["RedVTP ranks by the first denoising step"]),
    "AdaptiveK at once": (shortening(AdaptiveK(budget=4)), ["AdaptiveK decides by the first denoising step"]),
    "AdaptiveK without scores": (
        generating(unscored(), cache_selector=AdaptiveK(budget=4)),
        ["AdaptiveK ranks by the token selector's scores, and prompt 0 of the batch has none"],
    ),
    **{
        f"levels {levels}": (
            lambda levels=levels: AdaptiveK(budget=4, levels=levels),
            [f"levels={list(levels)}: give rising shares of the budget that end with 1"],
        )
        for levels in ((0.5, 0.9), (0.75, 0.5, 1.0), ())
    },
    **{
        f"candidates {bounds}": (
            lambda bounds=bounds: AdaptiveK(budget=4, candidates=bounds),
            [f"candidates={list(bounds)}: give rising numbers above 1, one fewer than levels"],
        )
        for bounds in ((3.0,), (1.0, 3.0), (3.0, 2.0))
    },
    "a rater's layer too many": (
        generating(cache_selector=SparseVLM(budget=2, layer=3)),
        ["layer=3: the language model has layers 0 to 2"],
    ),
    **{
        f"no text behind the picture, {build.__name__}": (
            generating(unasked(), cache_selector=build(budget=5)),
            [f"{build.__name__} ranks by the text behind the picture, and prompt 1 of the batch has none"],
        )
        for build in (SparseVLM, DART)
    },
    "keys before layer 0": (
        lambda: DART(budget=4, layer=0),
        ["layer=0: give the number of a layer, counted from 0, 1 or more"],
    ),
    **{
        f"{option} {n}": (
            lambda option=option, n=n: DART(budget=4, **{option: n}),
            [f"{option}={n!r}: give a whole number, {least} or more"],
        )
        for option, n, least in (("pivots_picture", 0, 1), ("pivots_text", -1, 0), ("pivots_text", 2.5, 0))
    },
    "more pivots than rows": (
        generating(cache_selector=DART(budget=3)),
        ["DART: budget 3 is smaller than pivots_picture=4"],
    ),
    **{
        f"ratio {ratio}": (
            lambda ratio=ratio: PyramidDrop(budget=4, ratio=ratio),
            [f"ratio={ratio!r}: give a share above 0 and at most 1"],
        )
        for ratio in (0.0, 1.5, True, float("nan"))
    },
    **{
        f"stages {stages}": (
            lambda stages=stages: PyramidDrop(budget=4, stages=stages),
            [f"stages={list(stages)}: give rising shares of the depth, above 0 and below 1"],
        )
        for stages in ((), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0), (float("nan"),))
    },
    "a stage behind the last layer": (
        generating(cache_selector=PyramidDrop(budget=4, stages=(0.9,))),
        ["stages=[0.9]: none of the 3 layers of the model lies behind them"],
    ),
    "less than the first stage": (
        generating(cache_selector=PyramidDrop(budget=2, ratio=None)),
        ["PyramidDrop: budget 2 is less than the 7 rows of the first 1 of 3 layers alone"],
    ),
    "stages and compiled": (
        generating(options={"engine": "compile"}, cache_selector=PyramidDrop(budget=4)),
        ["PyramidDrop keeps fewer rows in later layers, and decode.engine=compile needs the same number in all"],
    ),
    "two cache methods": (
        generating(cache_selector=FastV(budget=2), cache_packer=Int8()),
        ["give cache_selector or cache_packer, not both"],
    ),
    "no cache to pack": (
        generating(options={"prefix_cache": False}, cache_packer=Int8()),
        ["Int8 packs the prefix cache, and decode.prefix_cache=false has none: choose cache=none"],
    ),
    "packed and compiled": (
        generating(options={"engine": "compile"}, cache_packer=Int8()),
        ["Int8 is unpacked at every step: choose decode.engine=eager"],
    ),
    "int4": (lambda: Cast(dtype="int4"), ["dtype='int4': choose bfloat16 or float16"]),
    "groups of 0": (lambda: Int8(group=0), ["group=0: give how many numbers share a scale"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str) -> None:
    wrong, words = CASES[case]
    with pytest.raises(UserError) as error:
        wrong()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_unknown_options() -> None:
    with pytest.raises(TypeError, match="rate"):
        RedVTP(budget=2, rate=0.5)  # type: ignore[call-arg]  # what is tested


def test_profiles(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(MissingFileError, match="profile_cache` writes one"):
        LayerRetention(profile=str(path))
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a profile"):
        LayerRetention(profile=str(path))
    path.write_text(json.dumps({"forget": [0.1, 0.2]}))
    with pytest.raises(UserError, match="for a model with 2 layers, this one has 3: profile this model"):
        generating(cache_packer=LayerRetention(profile=str(path)))()
