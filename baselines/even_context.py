"""A part of the tokens by any selector, the other tokens evenly over the picture (docs/method.md, "even_context").

Shape letters: B batch, N source tokens, T selected tokens, P grid cells.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shirg import (
    BudgetShare,
    Selection,
    Selector,
    Share,
    Source,
    TokenLayout,
    UserError,
    VisionFeatures,
    gather_tokens,
    join,
    keep,
    layout_tables,
    stable_topk,
)
from shirg.budget import check_part, count_on


class EvenContext(Selector):
    """What a selector chooses at a part of its own budget, and an even context in place of the rest.

    The context is taken from the tokens that were not kept: first those of the finest grid (the tiles, or the only
    view) in the order of an ordered dither, then the others. A token whose cell is kept already, from another crop,
    comes behind all those. It shows what a method gains by ranking all of its tokens.

    Args:
        selector: with a budget in numbers, which is that of the whole.
        evidence: how many tokens it chooses, a number or (below 1) a share. What the selector makes in any case, the
            scaffold and the summary of SHIRG, is not counted.

    Raises:
        UserError: a selector without such a budget or with row ends of its own, or no token is left for the context.
    """

    def __init__(self, *, selector: Selector, evidence: float = 0.5) -> None:
        super().__init__(budget=selector.budget, geometry=selector.geometry)
        name = type(selector).__name__
        if not isinstance(self.budget, int | BudgetShare):
            has = "has no budget" if self.budget is None else "has budget=matched, which follows the picture"
            raise UserError(
                f"context=even divides a budget, and {name} {has}: choose another selector, a budget in numbers or of "
                "base, or context=none"
            )
        if selector.option("newline", "none") != "none":
            raise UserError(f"context=even adds tokens to rows that {name} has closed: choose newline=none")
        check_part("context.evidence", evidence)
        self.selector, self.evidence = selector, evidence
        # The same at the budget of the evidence, which `select` sets: it depends on the layout. In a tuple, since its
        # layers are the selector's and need no second name.
        self._chooser = (selector.at_budget(1),)
        self.stage, self.needs = selector.stage, selector.needs
        self.uses_relevance, self.reads_sample = selector.uses_relevance, selector.reads_sample
        self.may_use_less = selector.may_use_less

    def may_use_less_on(self, layout: TokenLayout, *, padding: bool = True) -> bool:
        return self.selector.may_use_less_on(layout, padding=padding)

    @property
    def inner(self) -> Selector:
        return self.selector.inner

    def select(self, features: VisionFeatures) -> Selection:
        assert isinstance(self.budget, int | BudgetShare)
        total = count_on(self.budget, features.layout)
        chosen_by_all, _ = self.selector.resolve_budget(features)
        count = self._evidence_of(chosen_by_all)
        (chooser,) = self._chooser
        chooser.budget = total - chosen_by_all + count
        evidence: Selection = chooser(features)
        context = self.selector.embed(self._context(features, evidence, chosen_by_all - count))
        return in_reading_order(context, evidence, features)

    def _evidence_of(self, n: int) -> int:
        """How many of `n` tokens are evidence."""
        part = self.evidence
        count = part if isinstance(part, int) else max(1, Share.of(part).nearest(n))
        if count >= n:
            raise UserError(
                f"context.evidence={part}: {type(self.selector).__name__} chooses {n} tokens at this budget, "
                "which leaves none for the context; lower context.evidence or raise the budget"
            )
        return count

    def _context(self, features: VisionFeatures, evidence: Selection, room: int) -> Selection:
        layout, tables = features.layout, layout_tables(features.layout)
        n, n_cells = layout.n_tokens, len(tables.even_P)
        # What is not kept is marked in one more column, which is cut off.
        kept_BT = evidence.index_BT.masked_fill(~evidence.mask_BT | (evidence.index_BT < 0), n)
        cell_BT = F.pad(tables.grid_cell_N, (0, 1), value=n_cells)[kept_BT]
        taken_BN = marked(kept_BT, n)
        deepest_M = tables.candidate_MC[:, 0]
        first_N = torch.cat([layout.order_N[: layout.n_global], deepest_M.masked_fill(deepest_M < 0, n)])
        doubled_BN = marked(cell_BT, n_cells)[:, tables.grid_cell_N] | ~marked(first_N[None], n)
        even_BN = tables.even_P[tables.grid_cell_N] + n_cells * doubled_BN
        free_BN = (features.valid_BN & ~taken_BN)[:, layout.order_N]
        worth_BN = (-even_BN)[:, layout.order_N].masked_fill(~free_BN, float("-inf"))
        ranked_BT = layout.order_N[stable_topk(worth_BN, room)]
        return keep(features, ranked_BT, free_BN.sum(-1).clamp_max(room))


def marked(index_BT: Tensor, n: int) -> Tensor:
    """bool [B, n]: which numbers occur in each row; `n` stands for none."""
    found = torch.zeros(len(index_BT), n + 1, dtype=torch.bool, device=index_BT.device)
    return found.scatter(1, index_BT, True)[:, :n]


def in_reading_order(context: Selection, evidence: Selection, features: VisionFeatures) -> Selection:
    """Both in reading order: a merged token where its box is, a scaffold first, a summary last.

    A merged token has no number; the source token with the nearest box says where it is read.
    """
    layout, n = features.layout, features.layout.n_tokens
    box_BN4 = features.box_BN4()[:, layout.order_N]
    # Not by a product of matrices, whose rounding would move a token that lies exactly on another.
    away_BTN = torch.cdist(evidence.box_BT4, box_BN4, compute_mode="donot_use_mm_for_euclid_dist")
    made_BT = away_BTN.argmin(-1).masked_fill(evidence.source_BT == int(Source.SCAFFOLD), -1)
    made_BT = made_BT.masked_fill(evidence.source_BT == int(Source.SUMMARY), n)
    both = join(context, evidence)
    place_BT = torch.where(
        both.index_BT < 0,
        torch.cat([torch.zeros_like(context.index_BT), made_BT], dim=1),
        layout.rank_N[both.index_BT.clamp_min(0)],
    )
    order_BT = torch.sort(place_BT.masked_fill(~both.mask_BT, n + 1), dim=-1, stable=True).indices
    return replace(
        both,
        tokens_BTD=gather_tokens(both.tokens_BTD, order_BT),
        index_BT=both.index_BT.gather(1, order_BT),
        source_BT=both.source_BT.gather(1, order_BT),
        box_BT4=gather_tokens(both.box_BT4, order_BT),
        mask_BT=both.mask_BT.gather(1, order_BT),
    )
