"""LLaVA-Scissor: tokens that are connected by their similarity become one (Sun et al., 2025, arXiv 2506.21862)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.base import Groups, GroupSelector, Scope, Space, gram, stage_of, with_merged
from baselines.linkage import APART, BOTTOM, components, cut, spanning_tree, sum_rows
from shirg import Budget, Selection, UserError, VisionFeatures, gather_tokens, keep, stable_topk

STEPS = 4
"""Thresholds that are tried for each picture after the first."""
ROOM = 1.5
"""Step 1 may leave this many times the budget, for step 2 to bring down."""
FAST = 16
"""A product of matrices whose sizes are multiples of this takes two thirds of the time of any other on a CPU."""


class LlavaScissor(GroupSelector):
    """Semantic connected components, in two steps, and a last one that gives every token a place.

    1. In each view, tokens with a cosine above tau are connected. A connected component becomes the mean of its tokens.
    2. The same with the means of all views, and the same tau.
    3. Each token joins the mean of step 2 that it resembles most. A mean m with the tokens J becomes
       (m + sum of J) / (|J| + 1).

    The count follows from the content. For a budget, tau is searched for each picture: the tau of the most components
    that fit. What is then left of the budget stays unused. A component is read at the position of its hub, the token
    with the most connections: in step 2 the mean with the most connections, and of that the token with the most in step
    1; of equals the first. A component of one token that no other joined is that token, unchanged.

    Args:
        budget: most tokens per picture.
        scope: whether step 1 works in each view, as in the paper in each frame, or on the whole picture.
        space: where tokens are compared and averaged: behind the projector, as in the paper, or before it.
        tau: the highest threshold; a picture that has more components than its budget gets the one that meets it. With
            a number a budget may be larger than the picture. None: no limit.
    """

    may_use_less: bool = True

    def __init__(
        self, *, budget: Budget, scope: Scope = "per_view", space: Space = "projected", tau: float | None = None
    ) -> None:
        super().__init__(budget=budget, scope=scope)
        if tau is not None and not -1 <= tau <= 1:
            raise UserError(f"tau={tau}: give a cosine between -1 and 1, or null for the one that meets the budget")
        self.stage = stage_of(space)
        self.space: Space = space
        self.tau = tau

    def check_count(self, features: VisionFeatures, wanted: int) -> None:
        if self.tau is None:
            super().check_count(features, wanted)

    def groups(self, features: VisionFeatures) -> tuple[Groups, int]:
        groups, k = super().groups(features)
        return groups, min(k, features.layout.n_tokens)

    def select(self, features: VisionFeatures) -> Selection:
        groups, k = self.groups(features)
        x_BGSD = groups(features.tokens_BND).float().masked_fill(~groups.valid_BGS[..., None], 0)
        x_BND = self.finite(x_BGSD, groups).flatten(1, 2)
        with torch.no_grad():
            graph = Graph.of(x_BND.detach(), groups, k)
            slots = graph.at(graph.search(groups.quota_BG.sum(-1), self.tau)).slots(k)
            joined_BN, joined_BT = graph.join(slots)
        own_BTD = sum_rows(x_BND * slots.share_BN[..., None], slots.slot_BN, k)
        sum_BTD = own_BTD + sum_rows(x_BND, joined_BN, k)
        mean_BTD = (sum_BTD / (joined_BT + 1)[..., None]).to(features.tokens_BND.dtype)
        # In reading order of the hubs.
        hub_BN = torch.zeros_like(joined_BN).scatter_reduce(1, slots.hub_BT, slots.used_BT.long(), "amax")
        hub_BN, slot_BN = (groups.back(x_BN.view_as(groups.valid_BGS)) for x_BN in (hub_BN, slots.slot_BN))
        order_N = features.layout.order_N
        chosen = keep(features, order_N[stable_topk(hub_BN[:, order_N].float(), k)], slots.used_BT.sum(-1))
        slot_BT = slot_BN.gather(1, chosen.index_BT.clamp_min(0))
        is_merged_BT = ((slots.tokens_BT != 1) | (joined_BT != 1)).gather(1, slot_BT) & chosen.mask_BT
        return with_merged(chosen, gather_tokens(mean_BTD, slot_BT), is_merged_BT)


@dataclass(frozen=True, eq=False)
class Trees:
    """The components of step 1 at every threshold."""

    parent_BN: Tensor
    weight_BN: Tensor
    """The edges of the maximum spanning trees of all groups, and the cosine of each."""
    ranked_BN: Tensor
    """`weight_BN`, the largest first."""
    valid_BN: Tensor

    def threshold(self, parts_B: Tensor) -> Tensor:
        """The highest tau [B] that leaves at most `parts` components in step 1; BOTTOM where no cosine does."""
        kept_B = self.valid_BN.sum(-1) - parts_B
        last_B = self.ranked_BN.gather(1, (kept_B - 1).clamp_min(0)[:, None]).squeeze(1)
        below_B = torch.nextafter(last_B, torch.full_like(last_B, -torch.inf)).clamp_min(BOTTOM)
        return torch.where(kept_B > 0, below_B, torch.inf)

    def parts(self, tau_B: Tensor) -> Tensor:
        """The component of each token, [B, N], numbered from 0 on by the first token that its tree reached."""
        root_BN = cut(self.parent_BN, self.weight_BN, tau_B)
        is_root_BN = (root_BN == torch.arange(root_BN.shape[1], device=root_BN.device)) & self.valid_BN
        return (is_root_BN.cumsum(-1) - 1).gather(1, root_BN).masked_fill(~self.valid_BN, 0)


@dataclass(frozen=True, eq=False)
class Graph:
    """How similar the N tokens of B pictures are, view by view, and the components of step 1 at every threshold.

    All sums of tokens that are compared are computed from the dot products of the tokens, so these are computed once.
    S is the number of slots of step 1.
    """

    gram_BNN: Tensor
    cosine_BGMM: Tensor
    """Of the M tokens of each group."""
    trees: "Trees"
    most: int
    """S."""
    member_BS: Tensor
    """A token of each component of step 1 at the highest threshold that is considered."""
    sums_BSS: Tensor
    """Dot products of the sums of these components."""

    @classmethod
    def of(cls, x_BND: Tensor, groups: Groups, k: int) -> "Graph":
        b, g, m = groups.valid_BGS.shape
        gram_BNN = gram(F.pad(x_BND, (0, 0, 0, -g * m % FAST))[:, None])[:, 0, : g * m, : g * m]
        inverse_BGM = inverse_length(gram_BNN).view(b, g, m)
        blocks = [gram_BNN[:, first : first + m, first : first + m] for first in range(0, g * m, m)]
        cosine_BGMM = torch.stack(blocks, dim=1).mul_(inverse_BGM[..., None] * inverse_BGM[..., None, :])
        apart_BGM = torch.where(groups.valid_BGS, 0.0, APART)
        cosine_BGMM += apart_BGM[..., None]
        cosine_BGMM += apart_BGM[..., None, :]
        parent_XM, weight_XM = spanning_tree(cosine_BGMM.flatten(0, 1))
        first_G1 = m * torch.arange(g, device=parent_XM.device)[:, None]
        weight_BN = weight_XM.view(b, g * m)
        valid_BN, most = groups.valid_BGS.flatten(1), min(g * m, max(math.ceil(ROOM * k), g))
        trees = Trees(
            parent_BN=(parent_XM.view(b, g, m) + first_G1).flatten(1),
            weight_BN=weight_BN,
            ranked_BN=weight_BN.sort(dim=-1, descending=True).values,
            valid_BN=valid_BN,
        )
        # Components at lower thresholds are unions of these, so that sums of these sums are enough for all of them.
        part_BN = trees.parts(trees.threshold(valid_BN.sum(-1).clamp_max(most)))
        at_BN = torch.arange(g * m, device=part_BN.device) * valid_BN
        member_BS = at_BN.new_zeros(b, most).scatter_reduce(1, part_BN, at_BN, "amax")
        sums_BSS = sum_both(gram_BNN, part_BN, most)
        return cls(gram_BNN, cosine_BGMM, trees, most, member_BS, sums_BSS)

    def search(self, quota_B: Tensor, limit: float | None) -> Tensor:
        """The threshold [B] of the largest count that fits the quota, of those tried; `limit` itself where it fits.

        As many components in step 1 as the quota always fit. Where step 2 makes them fewer, as many more are tried as
        are missing; where these do not fit, half as many.
        """
        most_B = self.trees.valid_BN.sum(-1).clamp_max(self.most)

        def tau(parts_B: Tensor) -> Tensor:
            return self.trees.threshold(parts_B).clamp_max(torch.inf if limit is None else limit)

        low_B, high_B = torch.minimum(quota_B, most_B), most_B + 1
        count_B = self.at(tau(low_B)).count_B
        best_B, best_count_B = low_B, count_B
        for step in range(STEPS if limit is None else STEPS + 1):
            is_limit = step == 0 and limit is not None
            more_B = torch.minimum((quota_B - count_B).clamp_min(1), (high_B - low_B) // 2)
            guess_B = most_B if is_limit else low_B + more_B
            found_B = self.at(tau(guess_B)).count_B
            fits_B = found_B <= quota_B
            is_better_B = fits_B if is_limit else fits_B & (found_B > best_count_B)
            best_B = torch.where(is_better_B, guess_B, best_B)
            best_count_B = torch.where(is_better_B, found_B, best_count_B)
            low_B, high_B = torch.where(fits_B, guess_B, low_B), torch.where(fits_B, high_B, guess_B)
            count_B = torch.where(fits_B, found_B, count_B)
        return tau(best_B)

    def at(self, tau_B: Tensor) -> "Parts":
        """Steps 1 and 2 at one threshold for each picture."""
        part_BN = self.trees.parts(tau_B)
        sums_BSS = sum_both(self.sums_BSS, part_BN.gather(1, self.member_BS), self.most)
        used_BS = torch.arange(self.most, device=tau_B.device) <= part_BN.amax(-1, keepdim=True)
        inverse_BS = inverse_length(sums_BSS)
        cosine_BSS = sums_BSS.mul_(inverse_BS[..., None] * inverse_BS[..., None, :])
        near_BSS = cosine_BSS > torch.where(used_BS, tau_B[:, None], torch.inf)[..., None]
        # Both halves, because a sum of rows and columns is rounded in another order than one of columns and rows.
        near_BSS = near_BSS & near_BSS.transpose(1, 2)
        whole_BS = components(near_BSS)
        is_first_BS = (whole_BS == torch.arange(self.most, device=tau_B.device)) & used_BS
        return Parts(self, tau_B, part_BN, used_BS, near_BSS, whole_BS, is_first_BS)

    def join(self, slots: "MergedSlots") -> tuple[Tensor, Tensor]:
        """Step 3: the slot that each token joins, [B, N], and how many tokens join each slot, [B, T]."""
        valid_BN, slot_BN, share_BN = self.trees.valid_BN, slots.slot_BN, slots.share_BN
        dots_BTN = sum_rows(self.gram_BNN * share_BN[..., None], slot_BN, slots.used_BT.shape[1])
        own_BN = dots_BTN.gather(1, slot_BN[:, None]).squeeze(1) * share_BN
        square_BT = sum_rows(own_BN[..., None], slot_BN, slots.used_BT.shape[1]).squeeze(-1)
        inverse_BT = torch.where(square_BT > 0, square_BT.clamp_min(0).rsqrt(), 0.0)
        unused_BT = torch.where(slots.used_BT, 0.0, -torch.inf)
        best_BN = torch.addcmul(unused_BT[..., None], dots_BTN, inverse_BT[..., None]).argmax(1)
        # A token that is its own mean resembles it most: nothing is left to rounding.
        is_alone_BN = slots.tokens_BT.gather(1, slot_BN) == 1
        joined_BN = torch.where(is_alone_BN, slot_BN, best_BN)
        return joined_BN, torch.zeros_like(slots.tokens_BT).scatter_add(1, joined_BN, valid_BN.long())


@dataclass(frozen=True, eq=False)
class Parts:
    """The components of step 1, "parts", at one threshold, and how step 2 connects them."""

    graph: Graph
    tau_B: Tensor
    part_BN: Tensor
    used_BS: Tensor
    near_BSS: Tensor
    whole_BS: Tensor
    """The component of step 2 of each part: one of its parts."""
    is_first_BS: Tensor
    """bool: True for one part of each component of step 2."""

    @property
    def count_B(self) -> Tensor:
        return self.is_first_BS.sum(-1)

    def slots(self, k: int) -> "MergedSlots":
        """The components of step 2 in `k` slots."""
        valid_BN, n = self.graph.trees.valid_BN, self.part_BN.shape[1]
        slot_BS = (self.is_first_BS.cumsum(-1) - 1).gather(1, self.whole_BS).masked_fill(~self.used_BS, 0)
        slot_BN = slot_BS.gather(1, self.part_BN)
        zero_BS, zero_BT = torch.zeros_like(slot_BS), slot_BS.new_zeros(len(slot_BS), k)
        size_BS = zero_BS.scatter_add(1, self.part_BN, valid_BN.long())
        parts_BT = zero_BT.scatter_add(1, slot_BS, self.used_BS.long())
        weight_BN = size_BS.gather(1, self.part_BN) * parts_BT.gather(1, slot_BN)
        # Of the largest key the degree is largest, and of equals the position lowest.
        from_end_N = n - 1 - torch.arange(n, device=slot_BN.device)
        degree_BN = (self.graph.cosine_BGMM > self.tau_B[:, None, None, None]).sum(-1).flatten(1)
        key_BN = (degree_BN * n + from_end_N).masked_fill(~valid_BN, 0)
        hub_BS = zero_BS.scatter_reduce(1, self.part_BN, key_BN, "amax") % n
        key_BS = (self.near_BSS.sum(-1) * n + hub_BS).masked_fill(~self.used_BS, 0)
        hub_BT = n - 1 - zero_BT.scatter_reduce(1, slot_BS, key_BS, "amax") % n
        return MergedSlots(
            slot_BN=slot_BN,
            share_BN=torch.where(valid_BN, 1 / weight_BN.clamp_min(1), 0.0),
            used_BT=torch.arange(k, device=slot_BN.device) < self.count_B[:, None],
            tokens_BT=zero_BT.scatter_add(1, slot_BN, valid_BN.long()),
            hub_BT=hub_BT,
        )


@dataclass(frozen=True, eq=False)
class MergedSlots:
    """The means of step 2 in T slots."""

    slot_BN: Tensor
    share_BN: Tensor
    """float32: the weight of each token in its mean; 0 for padding."""
    used_BT: Tensor
    tokens_BT: Tensor
    """int64: how many tokens each mean is made of."""
    hub_BT: Tensor
    """int64: the token at whose position each mean is read."""


def inverse_length(gram_BNN: Tensor) -> Tensor:
    """1 / length [B, N] of vectors by their dot products; 0 for a zero vector."""
    square_BN = gram_BNN.diagonal(dim1=1, dim2=2)
    return torch.where(square_BN > 0, square_BN.clamp_min(0).rsqrt(), 0.0)


def sum_both(gram_BNN: Tensor, part_BN: Tensor, parts: int) -> Tensor:
    """Dot products [B, parts, parts] of the sums of each part."""
    return sum_rows(sum_rows(gram_BNN, part_BN, parts).transpose(1, 2), part_BN, parts)
