"""What SHIRG, its layouts and the base class refuse: UserError in one sentence, with these words in it."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines import Saint, TopV, UniformGrid, VisPruner
from shirg import (
    Pooling,
    Selector,
    ShirgGate,
    ShirgSelector,
    VisionFeatures,
    cosine_relevance,
    crops_layout,
    features_from,
    tiles_layout,
)
from shirg.dedup import assign_cells
from shirg.options import CONFLICTS
from shirg.scaffold import scaffold_tokens
from shirg.scoring import pixel_edges
from tests.features import SIZES, geometry_layout, make_features
from tests.refusals import assert_says, message_of

ONE_VIEW: dict[str, Any] = {"geometry": "single_672", "scaffold": {"size": 0}}
CROPS: dict[str, Any] = {"geometry": "seed_canvas48", "scaffold": {"size": 0}}

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"budget": 0}, "budget=0: give a positive number of tokens, 'matched', 'base' or '3/4 base'"),
    ({"budget": -3}, "budget=-3"),
    ({"budget": 2.5}, "budget=2.5"),
    ({"budget": True}, "budget=True"),
    ({"budget": "wide"}, "budget='wide': give a positive number of tokens, 'matched', 'base' or '3/4 base'"),
    ({"budget": "1/2 wide"}, "budget='1/2 wide': give a positive number"),
    ({"budget": "0/2 base"}, "budget='0/2 base': give a positive number"),
    ({"budget": "half base"}, "budget='half base': give a positive number"),
    ({"geometry": "squares"}, "geometry='squares': choose one of lavida_tiles"),
    ({"views": "some"}, "views='some': choose one of tiles, all"),
    ({"norm": "l2"}, "norm='l2': choose one of zscore"),
    ({"coverage": -1}, "coverage=-1: give the side of a region"),
    ({"weights": {"crop": -1}}, "weights.crop=-1: give a number >= 0"),
    ({"neighbour": {"sign": 0}}, "neighbour.sign=0: choose one of -1, 1"),
    ({"neighbour": {"metric": "l1"}}, "neighbour.metric='l1': choose one of feature_l2, feature_cos"),
    ({"merge": {"mode": "scores"}}, "merge.mode='scores': choose one of none, tome"),
    ({"merge": {"share": 0.1}}, "merge.share has no effect with merge.mode=none"),
    ({"merge": {"mode": "tome", "share": 0.6}}, "merge.share=0.6 ... up to 0.5"),
    ({"diversity": {"weight": 2.0}}, "diversity.weight has no effect with diversity.mode=none"),
    ({"diversity": {"mode": "mmr", "weight": 0}}, "diversity.weight=0: give a number above 0"),
    ({"allocation": {"mode": "even"}}, "allocation.mode='even': choose one of ranked, evidence_context"),
    ({"allocation": {"evidence": 8}}, "allocation.evidence has no effect with allocation.mode=ranked"),
    ({"allocation": {"mass": 0.5}}, "allocation.mass has no effect with allocation.mode=ranked"),
    ({"allocation": {"mode": "evidence_context", "evidence": 0}}, "allocation.evidence=0: give a number of tokens"),
    ({"allocation": {"mode": "evidence_context", "evidence": 1.5}}, "allocation.evidence=1.5 ... between 0 and 1"),
    ({"allocation": {"mode": "evidence_context", "evidence": True}}, "allocation.evidence=True: give a number"),
    ({"allocation": {"mode": "evidence_context", "mass": 1.0}}, "allocation.mass=1.0: give a share between 0 and 1"),
    ({"adaptive": {"mode": "learned"}}, "adaptive.mode='learned': choose one of none, entropy, head"),
    ({"adaptive": {"mode": "head", "temperature": 0.1}}, "adaptive.temperature has no effect ... adaptive.mode=head"),
    ({"adaptive": {"mode": "entropy", "tolerance": 1.0}}, "adaptive.tolerance has no effect ... adaptive.mode=entropy"),
    ({"adaptive": {"mode": "head", "tolerance": -1.0}}, "adaptive.tolerance=-1.0: give a number >= 0"),
    ({"adaptive": {"mode": "entropy", "temperature": 0.0}}, "adaptive.temperature=0.0: give a number above 0"),
    ({"adaptive": {"mode": "entropy", "levels": [0.5]}}, "adaptive.levels=[0.5] ... rising shares ... end with 1"),
    ({"adaptive": {"levels": [0.1, 1.0]}}, "adaptive.levels has no effect with adaptive.mode=none"),
    ({"scaffold": {"size": -1}}, "scaffold.size=-1: give the tokens per side"),
    ({"scaffold": {"size": "3/2"}}, "scaffold.size='3/2' ... a share like '1/6'"),
    ({"scaffold": {"source": "views"}}, "scaffold.source='views': choose one of global, canvas"),
    ({"scaffold": {"size": 0, "source": "canvas"}}, "no effect while scaffold.size is 0"),
    # Each entry of CONFLICTS.
    ({"crop_term": "centre"}, "crop_term=centre ... only geometry=seed_canvas48 ... choose none, border or literal"),
    ({"geometry": "fovea", "crop_term": "literal"}, "crop_term=literal ... geometry=fovea ... choose none or border"),
    ({"crop_term": "border", "weights": {"crop": 0}}, "crop_term=border has no effect while weights.crop is 0"),
    ({"weights": {"crop": 5.0}}, "weights.crop=5.0 has no effect with crop_term=none ... default (0.1)"),
    ({"weights": {"neighbour": 0}, "neighbour": {"sign": 1}}, "neighbour.sign have no effect while"),
    (
        {"weights": {"neighbour": 0}, "neighbour": {"metric": "local_var"}},
        "neighbour.metric ... have no effect while",
    ),
    ({"weights": {"similarity": 0, "neighbour": 0}}, "nothing to rank by"),
    ({"variance_of": "neighbourhood"}, "variance_of has no effect while weights.variance is 0"),
    ({"edge_space": "pixels"}, "edge_space has no effect while weights.edge is 0"),
    ({"norm": "none", "norm_scope": "view"}, "norm_scope has no effect when norm=none ... default (image)"),
    ({"geometry": "fovea", "norm_scope": "view"}, "norm_scope=view ... geometry=fovea ... choose norm_scope=image"),
    ({**ONE_VIEW, "views": "all"}, "views=all ... geometry=single_672 ... choose views=tiles"),
    ({"views": "all", "underflow": "raise"}, "underflow=raise has no effect with views=all ... choose global or mask"),
    ({**ONE_VIEW, "mask_padding": False}, "mask_padding=False ... geometry=single_672 ... has no padding"),
    ({**ONE_VIEW, "underflow": "mask"}, "underflow=mask ... geometry=single_672 ... default (global)"),
    ({"dedup": "border"}, "dedup=border ... geometry=seed_canvas48 ... choose dedup=relevance"),
    ({**CROPS, "dedup": "mean"}, "dedup=mean ... underflow=global has nothing to fill with ... use underflow=mask"),
    (
        {**CROPS, "dedup": "mean", "underflow": "mask", "merge": {"mode": "tome"}},
        "dedup=mean and merge.mode=tome ... choose one of them",
    ),
    ({"coverage": 3, "diversity": {"mode": "mmr"}}, "diversity.mode=mmr ... choose coverage=0 or diversity.mode=none"),
    ({"coverage": 3, "allocation": {"mode": "evidence_context"}}, "spreads tokens itself; choose coverage=0"),
    ({"views": "all", "allocation": {"mode": "evidence_context"}}, "over the canvas; choose views=tiles"),
    ({"geometry": "single_672"}, "geometry=single_672 has no global view; choose scaffold.source=canvas"),
    ({"budget": "matched", "underflow": "raise"}, "underflow=raise ... budget=matched choose global or mask"),
    ({**CROPS, "underflow": "raise"}, "underflow=raise ... overlapping crops ... choose global or mask"),
    ({"coord_embed": "sincos_linear"}, "coord_embed=sincos_linear and coord_width ... go together"),
    ({"coord_width": 16}, "coord_embed=sincos_linear and coord_width ... go together"),
]
"""Options of ShirgSelector, and words of the message."""


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=str)
def test_options_are_refused(options: dict[str, Any], words: str) -> None:
    assert_says(message_of(partial(ShirgSelector, **{"budget": 69, **options})), words)


def test_each_conflict_of_options_is_tried() -> None:
    messages = [message_of(partial(ShirgSelector, **{"budget": 69, **options})) for options, _ in OPTIONS]
    for _, sentence in CONFLICTS:
        pattern = ".*".join(re.escape(part) for part in re.split(r"{.*?}", sentence))
        assert any(re.fullmatch(pattern, message) for message in messages), sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 1}, "temperature"),
        ({"weights": {"text": 1}}, "weights has no 'text'; it has similarity,"),
    ],
)
def test_unknown_options_are_a_type_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as caught:
        ShirgSelector(**{"budget": 69, **options})
    assert_says(str(caught.value), words)


class Norm(Selector):
    """A method as a user would write it."""

    needs = frozenset({"encoder"})

    def score(self, features: VisionFeatures) -> Tensor:
        return features.taps["encoder"].norm(dim=-1)


LAVIDA: dict[str, Any] = {"patch_px": 14, "view_px": 384, "pooling": Pooling(side=14)}
THIN = make_features((2, 2), sizes=[(3000, 300), (768, 768)])
"""The first picture is a strip of two rows: 36 tile tokens."""
TWO = make_features((2, 2), sizes=[(768, 768), (640, 480)])
SMALL: dict[str, Any] = {"scaffold": {"size": 3}}
TALL = make_features((2, 2), sizes=[(640, 480), (70, 1000)])


def scaffold(grid: tuple[int, int], source: Any, size: int) -> object:
    features = make_features(grid, sizes=SIZES[grid][:1])
    assigned = assign_cells(features.layout, features.valid_BN, features.relevance_BN, "relevance")
    return scaffold_tokens(features, assigned, size, source)


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "no columns": (lambda: tiles_layout(0, 2, side=27, **LAVIDA), "0 x 2 tiles ... 0 x 0 for no tiles"),
    "negative rows": (lambda: tiles_layout(-1, 1, side=27, **LAVIDA), "-1 x 1 tiles"),
    "patches too many": (
        lambda: tiles_layout(1, 2, side=28, **LAVIDA),
        "28 patches of 14 px do not fit ... view of 384 px",
    ),
    "crops apart": (lambda: crops_layout(3, 1, 14, Pooling(side=1)), "cannot overlap and cover ... canvas of 3 x 3"),
    "patch too small": (lambda: pixel_edges(torch.zeros(1, 3, 2, 2)), "edge_space=pixels ... 2 px ... choose features"),
    "scaffold of the global view": (lambda: scaffold((2, 2), "global", 10), "scaffold.size=10 ... choose at most 9"),
    "scaffold of the canvas": (lambda: scaffold((1, 3), "canvas", 10), "scaffold.size=10 ... choose at most 9"),
    "scaffold of no canvas": (lambda: scaffold((0, 0), "canvas", 1), "choose at most 0 ... source=global"),
    "scaffold above the budget": (
        lambda: ShirgSelector(budget=20, scaffold={"size": 6})(TWO),
        "takes 36 tokens ... budget=20 can be as small as 20",
    ),
    "scaffold above a matched budget": (
        lambda: ShirgSelector(budget="matched", scaffold={"size": 7})(THIN),
        "scaffold.size=7 takes 49 tokens, but budget=matched is 25 for picture 'picture-0'; lower scaffold.size",
    ),
    "scaffold above what a matched budget may be": (
        lambda: ShirgSelector(budget="matched", scaffold={"size": 6})(replace(TWO, counts=None)),
        "takes 36 tokens ... budget=matched can be as small as 25 for picture 'picture-0'; lower scaffold.size",
    ),
    "newlines above a matched budget": (
        lambda: ShirgSelector(budget="matched", newline="row", summary=True, scaffold={"size": 4})(TALL),
        "scaffold.size=4 and summary=true and newline=row take 35 tokens, but budget=matched is 25 for picture "
        "'picture-1'; lower scaffold.size, leave newlines out, or give the budget as a number",
    ),
    "merging of more than there is": (
        lambda: ShirgSelector(budget=109, merge={"mode": "tome", "share": 0.5}, **SMALL)(THIN),
        "asks for 100 tokens, but picture 'picture-0' has 99 tokens to choose from",
    ),
    "more regions than tokens": (
        lambda: ShirgSelector(budget=30, coverage=2)(TWO),
        "coverage=2 has 100 regions ... only 5 tokens ... raise coverage or budget",
    ),
    "no relevance": (
        lambda: ShirgSelector(budget=69)(replace(TWO, relevance_BN=None)),
        "ShirgSelector ranks by relevance ... pass relevance=, one number per token",
    ),
    "another geometry": (
        lambda: ShirgSelector(budget=60, geometry="fovea")(TWO),
        "is for geometry=fovea, the features are of lavida_tiles",
    ),
    "no count of the base model": (
        lambda: ShirgSelector(budget="matched", geometry="fovea")(
            replace(make_features(layout=geometry_layout("fovea")), base_count_B=None)
        ),
        "geometry=fovea needs VisionFeatures.base_count_B",
    ),
    "too few tile tokens": (
        lambda: ShirgSelector(budget=69, underflow="raise", **SMALL)(THIN),
        "picture 'picture-0' has 36 tile tokens ... underflow=global",
    ),
    "too few tokens": (
        lambda: ShirgSelector(budget=200, **SMALL)(THIN),
        "asks for 191 tokens ... picture 'picture-0' has 117 tokens ... underflow=mask",
    ),
    "too few tokens, padding included": (
        lambda: ShirgSelector(budget=500, underflow="mask", **SMALL)(THIN),
        "picture 'picture-0' has 405 tokens",
    ),
    "coordinates of another width": (
        lambda: ShirgSelector(budget=69, coord_embed="sincos_linear", coord_width=8, **SMALL)(TWO),
        "coord_width=8 ... tokens are 16 wide",
    ),
    "no tap": (lambda: Norm(budget=4)(replace(TWO, taps={})), "Norm needs the tap 'encoder' ... before the projector"),
    "no tap after the projector": (
        lambda: ShirgSelector(budget=69, scaffold={"size": 3, "space": "post"})(replace(TWO, taps={})),
        "needs the tap 'encoder', the tower's states ... pass taps={'encoder': ...} to features_from",
    ),
    "no budget": (lambda: Norm(budget=None)(TWO), "Norm has no budget"),
    "budget above the canvas": (
        lambda: Norm(budget=406)(TWO),
        "budget 406 ... 405 vision tokens ... canvas of 5 views",
    ),
    "budget above a picture": (
        lambda: Norm(budget=405)(TWO),
        f"budget 405 ... {TWO.n_valid[1]} tokens ... picture 'picture-1' ... lower the budget",
    ),
}


TOKENS = torch.randn(2, 12, 4)
GRID: dict[str, Any] = {"grid": (3, 4)}
BROKEN = torch.full((2, 12), 0.1).index_fill(1, torch.tensor(5), float("nan"))
PLAIN = features_from(TOKENS, **GRID)

TENSORS: dict[str, tuple[Callable[[], object], str]] = {
    "wrong grid": (
        lambda: features_from(TOKENS, grid=(4, 4)),
        "tokens of shape (2, 12, 4) are not 1 view of 4 x 4 tokens, 16 in all: check grid ... class tokens",
    ),
    "wrong views": (
        lambda: features_from(TOKENS, grid=(2, 2), views=(1, 3)),
        "tokens of shape (2, 12, 4) are not 4 views of 2 x 2 tokens, 16 in all",
    ),
    "views of another size": (
        lambda: features_from(TOKENS.view(2, 3, 4, 4), grid=(3, 4)),
        "tokens of shape (2, 3, 4, 4) are not 1 view of 3 x 4 tokens",
    ),
    "no grid": (lambda: features_from(TOKENS, grid=12), "grid=12: give two positive numbers, (rows, columns)"),  # type: ignore[arg-type]
    "empty tiles": (lambda: features_from(TOKENS, **GRID, views=(0, 2)), "views=(0, 2): give two positive numbers"),
    "global view somewhere": (
        lambda: features_from(TOKENS, **GRID, global_view="middle"),  # type: ignore[arg-type]
        "global_view='middle': choose one of first, last, none",
    ),
    "no view at all": (
        lambda: features_from(TOKENS, **GRID, global_view="none"),
        "global_view='none' has no effect without views=",
    ),
    "tokens of one picture": (
        lambda: features_from(TOKENS[0], **GRID),
        "tokens of shape (12, 4) ... give floating-point numbers of shape [B, N, D] or [B, V, n, D]",
    ),
    "ids for tokens": (lambda: features_from(TOKENS.long(), **GRID), "torch.int64: give floating-point numbers"),
    "tokens not finite": (lambda: features_from(TOKENS / 0, **GRID), "tokens has values that are NaN or infinite"),
    "attention not finite": (
        lambda: features_from(TOKENS, **GRID, attention=BROKEN),
        "attention has values that are NaN or infinite; compute it in float32",
    ),
    "relevance not finite": (
        lambda: features_from(TOKENS, **GRID, relevance=-BROKEN.log()),
        "relevance has values that are NaN or infinite",
    ),
    "tap not finite": (
        lambda: features_from(TOKENS, **GRID, taps={"keys@-1": BROKEN}),
        "taps['keys@-1'] has values that are NaN or infinite",
    ),
    "attention with a class token": (
        lambda: features_from(TOKENS, **GRID, attention=torch.rand(2, 3, 13, 13)),
        "attention of shape (2, 3, 13, 13) does not fit 2 pictures of 12 tokens ... without class tokens",
    ),
    "keys without heads": (
        lambda: features_from(TOKENS, **GRID, keys=TOKENS),
        "keys of shape (2, 12, 4) does not fit 2 pictures of 12 tokens; give [B, N, heads, width]",
    ),
    "relevance of another batch": (
        lambda: features_from(TOKENS, **GRID, relevance=torch.rand(1, 12)),
        "relevance of shape (1, 12) does not fit 2 pictures of 12 tokens; give [B, N]",
    ),
    "tap of other tokens": (
        lambda: features_from(TOKENS, **GRID, taps={"input@-1": torch.rand(2, 11, 4)}),
        "taps['input@-1'] of shape (2, 11, 4) does not fit 2 pictures of 12 tokens",
    ),
    "no valid token": (
        lambda: features_from(TOKENS, **GRID, valid=torch.tensor([[True], [False]]).expand(2, 12)),
        "valid: picture 'picture-1' has no token that is not padding",
    ),
    "valid in numbers": (lambda: features_from(TOKENS, **GRID, valid=torch.ones(2, 12)), "valid is of torch.float32"),
    "ids of another batch": (lambda: features_from(TOKENS, **GRID, ids=["a"]), "ids has 1 entries for 2 pictures"),
    "sizes of three": (
        lambda: features_from(TOKENS, **GRID, sizes=[(1, 2, 3)] * 2),  # type: ignore[list-item]
        "sizes: give 2 numbers for each picture",
    ),
    "no tokens in the base model": (lambda: features_from(TOKENS, **GRID, base=0), "base=0: give the positive number"),
    "missing keys": (
        lambda: Saint(budget=3)(PLAIN),
        "Saint needs the tap 'keys@0.83', the attention keys ... at 0.83 of the depth: pass keys= to features_from; "
        "in a transformers vision tower a forward hook on the layer's self_attn.k_proj",
    ),
    "missing attention": (
        lambda: VisPruner(budget=3)(PLAIN),
        "VisPruner needs the tap 'attention@-1' ... of layer -1: pass attention= ... output_attentions=True",
    ),
    "missing states": (
        lambda: TopV(budget=3)(PLAIN),
        "TopV needs the tap 'input@-1' ... pass taps={'input@-1': ...} ... output_hidden_states=True",
    ),
    "missing tap of a user": (
        lambda: Depth(budget=3)(PLAIN),
        "Depth needs the tap 'depth': pass taps={'depth': ...} to features_from",
    ),
    "missing relevance": (
        lambda: ShirgGate(budget=8, scaffold={"size": 2})(PLAIN),
        "ShirgSelector ranks by relevance, and these features have none: pass relevance=",
    ),
    "budget above the tokens": (
        lambda: UniformGrid(budget=13)(PLAIN),
        "UniformGrid: budget 13 is larger than the 12 vision tokens",
    ),
    "share of an unknown base": (
        lambda: UniformGrid(budget="3/4 base")(PLAIN),  # type: ignore[arg-type]
        "budget='3/4 base' is relative to the base model's number of tokens ... pass base= to features_from",
    ),
    "matched without pooling": (
        lambda: UniformGrid(budget="matched")(PLAIN),
        "do not say how the base model pools its views: give the budget as a number ... pooling=shirg.Pooling",
    ),
    "matched on rectangles": (
        lambda: UniformGrid(budget="matched")(
            features_from(TOKENS, grid=(2, 3), views=(1, 1), pooling=Pooling(side=2))
        ),
        "views of 2 x 3 tokens are not square",
    ),
    "scaffold without a global view": (
        lambda: ShirgGate(budget=8, scaffold={"size": 2})(
            features_from(TOKENS, **GRID, views=(1, 1), global_view="none", relevance=TOKENS[..., 0])
        ),
        "scaffold.source=global: these features have no view of the whole picture; choose source 'canvas'",
    ),
    "texts of another batch": (
        lambda: cosine_relevance(TOKENS, [TOKENS[0]]),
        "tokens of shape (2, 12, 4) and 1 texts: give tokens [B, N, D] and a text for each",
    ),
    "text of another width": (
        lambda: cosine_relevance(TOKENS, torch.rand(2, 3, 5)),
        "text 0 has the shape (3, 5): give [Q, 4]",
    ),
    "empty question": (lambda: cosine_relevance(TOKENS, torch.rand(2, 0, 4)), "text 0 ... at least one token"),
    "unknown aggregate": (
        lambda: cosine_relevance(TOKENS, TOKENS, agg="sum"),  # type: ignore[arg-type]
        "agg='sum': choose one of mean, max, pooled",
    ),
}
"""What a caller with plain tensors may get wrong."""


class Depth(Selector):
    """A method with a tap of its own."""

    needs = frozenset({"depth"})


@pytest.mark.parametrize("case", TENSORS)
def test_plain_tensors_are_refused(case: str) -> None:
    call, words = TENSORS[case]
    assert_says(message_of(call), words)


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_refused(case: str) -> None:
    call, words = CALLS[case]
    assert_says(message_of(call), words)


def test_a_method_without_score_or_select_raises() -> None:
    with pytest.raises(NotImplementedError, match="Selector must override score or select"):
        Selector(budget=4)(TWO)
