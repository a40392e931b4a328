"""What several baselines share: quotas per view, products of tokens in blocks, rounds of pair matching.

Shape letters: B batch, N source tokens, G groups, S tokens of a group, T selected tokens, D width. In pair matching M
slots of a list, of which E are even and O odd.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from shirg import (
    Budget,
    Selection,
    Selector,
    Share,
    Source,
    UserError,
    VisionFeatures,
    assert_finite,
    gather_tokens,
    keep,
    layout_tables,
    stable_topk,
)
from shirg.scoring import unit
from shirg.selection import Stage
from shirg.validation import one_of

Scope = Literal["per_view", "global"]
"""Whether each view is a group, or the whole picture."""
Space = Literal["projected", "encoder"]
"""Whether similarities are those of projected tokens, or of encoder states."""

ListOrder = Literal["official", "reading"]
"""How a list of pairs is ordered between rounds: as in the authors' code, or by position."""

BLOCK = 456
"""Rows of a Gram matrix that are computed at a time on a CPU: an eighth of five views, enough for a fast product."""
CACHED = 1 << 18
"""Products that `product_strips` yields at a time on a CPU: one megabyte, which fits a core's cache."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The tokens of B pictures in groups, and how many of each group are kept."""

    index_GS: Tensor
    """int64: the source token at each position of each group; positions and groups are in reading order."""
    valid_BGS: Tensor
    """bool: False for letterbox padding."""
    quota_BG: Tensor
    """int64: tokens to keep. Each group keeps the same share of its valid tokens, and the sum is exact."""
    most: int
    """Upper bound of all quotas; known on the host, so that loops have a length."""
    share: float
    """Lower bound of the share of its valid tokens that a group keeps, but for rounding down."""

    def __call__(self, per_token_BN: Tensor) -> Tensor:
        """[B, N, ...] -> [B, G, S, ...]."""
        picked = per_token_BN.index_select(1, self.index_GS.flatten())
        return torch.unflatten(picked, 1, self.index_GS.shape)

    def back(self, per_position_BGS: Tensor) -> Tensor:
        """[B, G, S] -> [B, N]."""
        inverse_N = torch.argsort(self.index_GS.flatten())
        return per_position_BGS.flatten(1).index_select(1, inverse_N)


def split(features: VisionFeatures, scope: Scope, keep_B: Tensor, *, most: int, least: int) -> Groups:
    """Groups whose quotas add up to `keep_B`; `least` and `most` are its bounds, known on the host."""
    layout = features.layout
    if scope == "per_view":
        canvas_M = layout.order_N[layout.n_global :].index_select(0, layout_tables(layout).by_tile_M)
        index_GS = torch.cat([layout.order_N[: layout.n_global], canvas_M]).view(-1, layout.view_tokens)
    else:
        index_GS = layout.order_N[None]
    valid_BGS = features.valid_BN[:, index_GS]
    # The sum up to a view is rounded, not the share of each view: the quotas then add up, and none exceeds its view.
    upto_BG = valid_BGS.sum(-1).cumsum(-1)
    owed_BG = keep_B[:, None] * upto_BG // upto_BG[:, -1:].clamp_min(1)
    s = index_GS.shape[1]
    return Groups(
        index_GS=index_GS,
        valid_BGS=valid_BGS,
        quota_BG=owed_BG.diff(dim=-1, prepend=torch.zeros_like(owed_BG[:, :1])),
        most=min(s, -(-s * most // max(min(features.n_valid), 1))),
        share=min(1.0, least / max(features.n_valid)),
    )


class GroupSelector(Selector):
    """A selector that works inside groups: a subclass chooses which positions of each group are kept."""

    def __init__(self, *, budget: Budget, scope: Scope = "per_view") -> None:
        super().__init__(budget=budget)
        one_of("scope", scope, Scope)
        self.scope: Scope = scope

    def choose(self, features: VisionFeatures, groups: Groups) -> tuple[Tensor, Tensor | None]:
        """Which positions are kept, bool [B, G, S], as many as the quotas; and what they were ranked by, or None."""
        raise NotImplementedError(f"{type(self).__name__} must override choose")

    def select(self, features: VisionFeatures) -> Selection:
        with torch.no_grad():
            groups, k = self.groups(features)
            chosen_BGS, scores_BGS = self.choose(features, groups)
        return chosen_tokens(features, groups, chosen_BGS, scores_BGS, k)

    def groups(self, features: VisionFeatures) -> tuple[Groups, int]:
        """The groups and the static number of slots."""
        k, keep_B = self.resolve_budget(features)
        keep_B = torch.minimum(keep_B, features.valid_BN.sum(-1))
        least = features.layout.known_pooling.side**2 if self.budget == "matched" else k
        return split(features, self.scope, keep_B, most=k, least=least), k

    def unit_tokens(self, features: VisionFeatures, groups: Groups) -> Tensor:
        """Tokens of length 1, [B, G, S, D] float32: projected ones at stage "post"."""
        return self.finite(unit(groups(features.tokens_BND).float()), groups)

    def unit_keys(self, features: VisionFeatures, groups: Groups, tap: str) -> Tensor:
        """Attention keys averaged over heads, of length 1, [B, G, S, D / heads] float32."""
        return self.finite(unit(groups(features.taps[tap].float().mean(-2))), groups)

    def finite(self, x_BGSD: Tensor, groups: Groups) -> Tensor:
        """`x_BGSD` unchanged; raises RuntimeError where a valid token is not finite."""
        assert_finite(x_BGSD.sum(-1), groups.valid_BGS, type(self).__name__)
        return x_BGSD


def chosen_tokens(
    features: VisionFeatures, groups: Groups, chosen_BGS: Tensor, scores_BGS: Tensor | None, k: int
) -> Selection:
    """The chosen positions as a selection of `k` slots in reading order."""
    order_N = features.layout.order_N
    ranked_BK = order_N[stable_topk(groups.back(chosen_BGS)[:, order_N].float(), k)]
    scores_BN = None if scores_BGS is None else groups.back(scores_BGS)
    return keep(features, ranked_BK, groups.quota_BG.sum(-1), scores_BN=scores_BN)


def take(scores_BGS: Tensor, count_BG: Tensor) -> Tensor:
    """bool [..., S]: the `count` highest scores of each row; of equal scores the first."""
    order_BGS = torch.sort(scores_BGS, dim=-1, descending=True, stable=True).indices
    slot_S = torch.arange(scores_BGS.shape[-1], device=scores_BGS.device)
    return torch.zeros_like(scores_BGS, dtype=torch.bool).scatter(-1, order_BGS, slot_S < count_BG[..., None])


def picked(pick_BGK: Tensor, groups: Groups) -> Tensor:
    """bool [B, G, S]: the positions that were picked one by one, as many as each group's quota."""
    counts_BGK = torch.arange(pick_BGK.shape[-1], device=pick_BGK.device) < groups.quota_BG[..., None]
    # Added up, because a group without free positions picks one again, and that must not undo the first pick.
    return (
        torch.zeros_like(groups.quota_BG[..., None])
        .expand_as(groups.valid_BGS)
        .scatter_add(-1, pick_BGK, counts_BGK.long())
        > 0
    )


def spread(marked_BGS: Tensor, count_BG: Tensor) -> Tensor:
    """bool [..., S]: `count` of the marked positions of each row, evenly spaced."""
    number_BGS = marked_BGS.cumsum(-1)
    count_BG1, total_BG1 = count_BG[..., None], number_BGS[..., -1:].clamp_min(1)
    # A position is taken where the rounded running share rises by one: exactly `count` of them, none at the very edge.
    reached = (2 * number_BGS * count_BG1 + total_BG1) // (2 * total_BG1)
    before = (2 * (number_BGS - 1) * count_BG1 + total_BG1) // (2 * total_BG1)
    return marked_BGS & (reached > before)


def every(marked_BGS: Tensor, count_BG: Tensor) -> Tensor:
    """bool [..., S]: of each row's n marked positions every floor(n / count)-th from the first on, `count` of them."""
    number_BGS = marked_BGS.cumsum(-1) - 1
    step_BG1 = ((number_BGS[..., -1:] + 1) // count_BG[..., None].clamp_min(1)).clamp_min(1)
    return marked_BGS & (number_BGS % step_BG1 == 0) & (number_BGS // step_BG1 < count_BG[..., None])


def absorb(
    features: VisionFeatures,
    groups: Groups,
    chosen: Selection,
    stays_BGS: Tensor,
    owner_BGS: Tensor,
    member_BGS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum [B, T, D] in float32 and number [B, T] of the members that each selected token owns.

    `owner_BGS` is the position, in the same group, of the token that a member joins. Computed as a product with a 0-1
    matrix, because adding rows by index rounds differently in every run on a GPU.
    """
    slot_BGS = stays_BGS.cumsum(-1) - 1
    slots = torch.arange(groups.most, device=owner_BGS.device)
    joins_BGQS = (slot_BGS.gather(-1, owner_BGS)[..., None, :] == slots[:, None]) & member_BGS[..., None, :]
    sums_BGQD = joins_BGQS.float() @ groups(features.tokens_BND).float()
    group_G1 = torch.arange(len(groups.index_GS), device=slots.device)[:, None]
    row_BN = groups.back(group_G1 * groups.most + slot_BGS.clamp_min(0))
    row_BT = row_BN.gather(1, chosen.index_BT.clamp_min(0))
    sums_BTD = sums_BGQD.flatten(1, 2).gather(1, row_BT[..., None].expand(-1, -1, sums_BGQD.shape[-1]))
    number_BT = joins_BGQS.sum(-1).flatten(1).gather(1, row_BT).masked_fill(chosen.index_BT < 0, 0)
    return sums_BTD, number_BT


def with_merged(chosen: Selection, tokens_BTD: Tensor, is_merged_BT: Tensor) -> Selection:
    """The selection with some of its tokens replaced by merged ones, which have index -1."""
    return replace(
        chosen,
        tokens_BTD=torch.where(is_merged_BT[..., None], tokens_BTD, chosen.tokens_BTD),
        index_BT=chosen.index_BT.masked_fill(is_merged_BT, -1),
        source_BT=chosen.source_BT.masked_fill(is_merged_BT, int(Source.MERGED)),
    )


def gram(x_BGSD: Tensor) -> Tensor:
    """Dot products [B, G, S, S] of all tokens of a group; equal to x @ x^T, which computes each of them twice.

    On a CPU the part above the diagonal is computed block by block, and copied to the part below it.
    """
    s = x_BGSD.shape[-2]
    if s <= BLOCK or x_BGSD.device.type != "cpu":
        return x_BGSD @ x_BGSD.transpose(-1, -2)
    out_BGSS = x_BGSD.new_empty(*x_BGSD.shape[:-1], s)
    for first in range(0, s, BLOCK):
        end = min(first + BLOCK, s)
        strip = x_BGSD[..., first:end, :] @ x_BGSD[..., first:, :].transpose(-1, -2)
        out_BGSS[..., first:end, first:] = strip
        out_BGSS[..., end:, first:end] = strip[..., end - first :].transpose(-1, -2)
    return out_BGSS


def rows(x_BGSD: Tensor, position_BGM: Tensor) -> Tensor:
    """Rows [B, G, M, D] of each group by their position in it."""
    picked = gather_tokens(x_BGSD.flatten(0, 1), position_BGM.flatten(0, 1))
    return torch.unflatten(picked, 0, position_BGM.shape[:2])


def products(a_XED: Tensor, b_XOD: Tensor, used_XO: Tensor, otherwise: float) -> Tensor:
    """Dot products [X, E, O]; `otherwise` where b is not used."""
    a, b = _with_fill(a_XED, b_XOD, used_XO, otherwise)
    return a @ b.transpose(-1, -2)


def product_strips(a_XED: Tensor, b_XOD: Tensor, used_XO: Tensor, otherwise: float) -> Iterator[Tensor]:
    """The same, on a CPU some of the E rows at a time, elsewhere all of them."""
    a, b = _with_fill(a_XED, b_XOD, used_XO, otherwise)
    row = max(1, b[..., 0].numel())  # a list of one token has no odd places
    for strip in a.split(max(1, CACHED // row) if a.device.type == "cpu" else a.shape[-2], dim=-2):
        yield strip @ b.transpose(-1, -2)


def _with_fill(a_XED: Tensor, b_XOD: Tensor, used_XO: Tensor, otherwise: float) -> tuple[Tensor, Tensor]:
    """Both with one more channel, in which each a is 1: to fill a matrix by a mask takes longer than to compute it."""
    b_XOD = b_XOD * used_XO[..., None]
    fill_XO1 = torch.where(used_XO, 0.0, otherwise)[..., None]
    return torch.cat([a_XED, torch.ones_like(a_XED[..., :1])], dim=-1), torch.cat([b_XOD, fill_XO1], dim=-1)


def stage_of(space: Space) -> Stage:
    """The stage of a selector that compares tokens in a space; raises UserError where there is no such space."""
    one_of("space", space, Space)
    return "post" if space == "projected" else "pre"


def share_per_round(rho: float) -> float:
    """`rho`; raises UserError unless it is a share of tokens that a round can remove."""
    if not 0 < rho < 1:
        raise UserError(f"rho={rho}: give the share of tokens that a round removes, between 0 and 1")
    return rho


def count_per_round(rho: float, size: int) -> int:
    """How many of a group's `size` positions a round removes: the nearest count to their share, and at least one."""
    return max(1, Share.of(rho).nearest(size))


def rounds_of(removals: int, per_round: int) -> int:
    """Rounds that remove `removals` tokens from a list when each removes `per_round`, at most every second token."""
    return -(-removals // per_round) + math.ceil(math.log2(2 * per_round)) + 1


@dataclass(frozen=True, eq=False)
class PairList:
    """One list of M slots per group: the first n of them hold the tokens that are left."""

    position_BGM: Tensor
    """int64: the position in the group; behind the first n any position, also one that is there already."""
    n_BG: Tensor

    @classmethod
    def of(cls, left_BGS: Tensor, by_BGS: Tensor | None = None) -> Self:
        """The tokens that are left in reading order, or with the largest `by` first."""
        by_BGS = left_BGS.to(torch.uint8) if by_BGS is None else by_BGS.masked_fill(~left_BGS, float("-inf"))
        return cls(torch.sort(by_BGS, dim=-1, descending=True, stable=True).indices, left_BGS.sum(-1))

    def even(self) -> Tensor:
        return self.position_BGM[..., 0::2]

    def odd(self) -> Tensor:
        return self.position_BGM[..., 1::2]

    def even_used(self) -> Tensor:
        """bool: which even slots hold a token."""
        return 2 * torch.arange(self.even().shape[-1], device=self.n_BG.device) < self.n_BG[..., None]

    def odd_used(self) -> Tensor:
        return 2 * torch.arange(self.odd().shape[-1], device=self.n_BG.device) + 1 < self.n_BG[..., None]

    def ranked(self, scores_BGE: Tensor) -> Tensor:
        """int64: the even slots by falling score; of equal scores the last first, because the first is kept.

        Slots without a token are at the end. Scores are finite.
        """
        scores_BGE = scores_BGE.masked_fill(~self.even_used(), float("-inf"))
        flipped_BGE = torch.sort(scores_BGE.flip(-1), dim=-1, descending=True, stable=True).indices
        return scores_BGE.shape[-1] - 1 - flipped_BGE

    def without(self, ranked_BGE: Tensor, count_BG: Tensor, slots: int, order: ListOrder = "reading") -> Self:
        """The list without the first `count` of the ranked even slots, cut to `slots`.

        `order`: "official" puts the even slots that stay first, in their ranked order, and then the odd ones;
        "reading" leaves each token behind those that were before it.
        """
        m, e = self.position_BGM.shape[-1], ranked_BGE.shape[-1]
        count_BG1 = count_BG[..., None]
        if order == "reading":
            gone_BGE = torch.arange(e, device=count_BG.device) < count_BG1
            gone_BGM = torch.zeros_like(self.position_BGM, dtype=torch.uint8)
            gone_BGM = gone_BGM.scatter(-1, 2 * ranked_BGE, gone_BGE.to(torch.uint8))
            stays_BGM = torch.sort(gone_BGM, dim=-1, stable=True).indices[..., :slots]
        else:
            slot_M = torch.arange(min(m, slots), device=count_BG.device)
            evens_BG1 = self.even_used().sum(-1, keepdim=True) - count_BG1
            even_BGM = 2 * ranked_BGE.gather(-1, (slot_M + count_BG1).clamp_max(e - 1))
            odd_BGM = (2 * (slot_M - evens_BG1) + 1).clamp(0, m - 1)
            stays_BGM = torch.where(slot_M < evens_BG1, even_BGM, odd_BGM)
        return type(self)(self.position_BGM.gather(-1, stays_BGM), self.n_BG - count_BG)

    def mask(self, size: int) -> Tensor:
        """bool [B, G, S] for groups of `size` tokens: which are left."""
        used = torch.arange(self.position_BGM.shape[-1], device=self.n_BG.device) < self.n_BG[..., None]
        count_BGS = torch.zeros(*self.n_BG.shape, size, dtype=torch.int64, device=self.n_BG.device)
        return count_BGS.scatter_add(-1, self.position_BGM, used.long()) > 0
