"""Selectors on the tokens of golden cases, each through its own class, against what the official code kept or merged.

A case is a list of N tokens, in which only the order matters: it becomes one view, squared up with padding.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import CDPruner, DivPrune, Saint, SaintVote, ToMe, VisionZip, VisPruner
from shirg import Pooling, Selection, VisionFeatures
from shirg.layouts import single_layout
from tests.parity.rivals.agreement import Check, RivalCase

TOLERANCE = 1e-5
"""Of means of tokens of about unit scale in float32."""


def features_of(
    tokens_ND: Tensor, *, relevance_N: Tensor | None = None, side: int = 0, **taps: Tensor
) -> VisionFeatures:
    """One picture of these tokens in reading order. The rest of the square view is padding with copies of the first.

    `taps`: recordings of the last layer, by what they are.
    """
    n = len(tokens_ND)
    side = max(side, isqrt(n - 1) + 1)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x[:1].expand(side * side - n, *x.shape[1:])])[None].float()

    layout = single_layout(side, 14, Pooling(side=-(-side // 2), most=side * side), geometry="lavida_tiles")
    return VisionFeatures(
        tokens_BND=padded(tokens_ND),
        layout=layout,
        valid_BN=torch.arange(side * side)[None] < n,
        picture_B4=torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
        size_B2=torch.tensor([[14 * side, 14 * side]]),
        ids=("case",),
        n_valid=(n,),
        relevance_BN=None if relevance_N is None else padded(relevance_N),
        taps={f"{what}@-1": padded(x) for what, x in taps.items()},
    )


def one_head(keys_ND: Tensor) -> Tensor:
    return keys_ND[:, None]


def kept(chosen: Selection) -> list[int]:
    """The places of all selected tokens, which must be unchanged source tokens."""
    assert bool(chosen.mask_BT.all()) and bool((chosen.index_BT >= 0).all())
    index: list[int] = chosen.index_BT[0].tolist()
    return index


def with_membership(tokens_ND: Tensor) -> Tensor:
    """Tokens with N more channels, one for each source: in a merged token they say how much of each source it holds."""
    return torch.cat([tokens_ND, torch.eye(len(tokens_ND))], dim=-1)


def places(features: VisionFeatures, chosen: Selection) -> list[int]:
    """The places of all selected tokens, merged ones too, by their boxes."""
    same_TN = (chosen.box_BT4[0, :, None] == features.box_BN4()[0]).all(-1)
    assert bool((same_TN.sum(-1) == 1).all())
    found: list[int] = same_TN.long().argmax(-1).tolist()
    return found


def vispruner(case: RivalCase) -> None:
    features = features_of(case["tokens"], attention=case["attention"])
    important = case.given["important"]
    # With all of the budget for attention there are no rounds, and the option is refused.
    rounds = {"rho": case.given["drop_per_round"] / features.layout.n_tokens} if important < 1 else {}
    chosen = VisPruner(budget=case.given["budget"], scope="global", important=important, **rounds)(features)
    case.same("kept", kept(chosen), case["kept"].tolist())


def visionzip(case: RivalCase) -> None:
    tokens_ND, budget, contextual = case["tokens"], case.given["budget"], case.given["contextual"]
    n, d = tokens_ND.shape
    features = features_of(with_membership(tokens_ND), attention=case["attention"], keys=one_head(case["keys"]))
    chosen = VisionZip(budget=budget, scope="global", contextual=contextual / budget)(features)
    at, merged_T = places(features, chosen), chosen.index_BT[0] < 0
    targets = case["targets"].tolist()
    case.same("dominant", [p for p in at if p not in targets], case["dominant"].tolist())
    case.same("targets", [p for p in at if p in targets], targets)
    case.same(
        "merged", sorted({p for p, is_merged in zip(at, merged_T.tolist(), strict=True) if is_merged} - {*targets}), []
    )
    contextual_T = torch.tensor([p in targets for p in at])
    case.close("contextual tokens", chosen.tokens_BTD[0, contextual_T, :d], case["contextual_tokens"], TOLERANCE)
    # A target counts as itself, its members together as one: every source token is somewhere.
    if targets:
        total_N = chosen.tokens_BTD[0, :, d:].gt(0).sum(0)
        case.same("members", total_N.tolist(), [1] * n)


def tome(case: RivalCase) -> None:
    tokens_ND, r = case["tokens"], case.given["r"]
    d, orders = tokens_ND.shape[1], {"official_order": "official", "one_round": "official", "reading_order": "reading"}
    features = features_of(with_membership(tokens_ND), keys=one_head(case["keys"]))
    variants = case.variants("owner")
    assert variants, f"case {case.name} has no tensor *.owner"
    for variant in variants:
        assert variant in orders, f"tome, case {case.name}: no check knows {variant!r}"
        budget, rho = case.given["budget"][variant], r / features.layout.n_tokens
        chosen = ToMe(budget=budget, scope="global", rho=rho, order=orders[variant])(features)
        share_TN = chosen.tokens_BTD[0, :, d:]
        owner_N, size_T = case[f"{variant}.owner"], case[f"{variant}.size"]
        case.same("places", places(features, chosen), case[f"{variant}.place"].tolist())
        case.same("owners", share_TN.argmax(0).tolist(), owner_N.tolist())
        case.same("sizes", share_TN.gt(0).sum(-1).tolist(), size_T.tolist())
        joins_TN = F.one_hot(owner_N, budget).T.to(tokens_ND)
        means_TD = joins_TN @ tokens_ND / size_T[:, None]
        case.close("merged tokens", chosen.tokens_BTD[0, :, :d], means_TD, TOLERANCE)


def saint(case: RivalCase) -> None:
    keys_ND = case["keys"]
    features = features_of(keys_ND, keys=one_head(keys_ND))
    budgets = {"kept": case.given["budget"]} | {f"{x}.kept": case.given[f"{x}_budget"] for x in case.variants("kept")}
    for name, budget in budgets.items():
        chosen = Saint(budget=budget, scope="global", rho=1 / case.given["r"], layer=-1)(features)
        case.same("kept", kept(chosen), case[name].tolist())


def saint_vote(case: RivalCase) -> None:
    keys_ND, options = case["keys"], {name: case.given[name] for name in ("budget", "tau", "votes", "gamma")}
    chosen = SaintVote(**options, scope="global", layer=-1)(features_of(keys_ND, keys=one_head(keys_ND)))
    case.same("kept", kept(chosen), case["kept"].tolist())


def divprune(case: RivalCase) -> None:
    """The kept vectors; and their places, where no vector occurs twice, since duplicates are as good as each other."""
    tokens_ND, theirs = case["tokens"], sorted(case["picked"].tolist())
    ours = kept(DivPrune(budget=case.given["budget"], scope="global")(features_of(tokens_ND)))
    case.same("kept vectors", *(sorted(tokens_ND[index].tolist()) for index in (ours, theirs)))
    if len(tokens_ND.unique(dim=0)) == len(tokens_ND):
        case.same("kept", ours, theirs)


def cdpruner(case: RivalCase) -> None:
    image_NE, text_ME = (F.normalize(case[name], dim=-1) for name in ("image_embeds", "text_embeds"))
    case.close("relevance", (image_NE @ text_ME.T).mean(-1), case["cosine"], TOLERANCE)
    features = features_of(case["tokens"], relevance_N=case["cosine"])
    chosen = CDPruner(budget=case.given["budget"], scope="global", sign=case.given["sign"])(features)
    case.same("kept", kept(chosen), case["kept"].tolist())


SELECTORS: dict[str, Check] = {
    "vispruner": vispruner,
    "visionzip": visionzip,
    "tome": tome,
    "saint": saint,
    "saint_vote": saint_vote,
    "divprune": divprune,
    "cdpruner": cdpruner,
}
