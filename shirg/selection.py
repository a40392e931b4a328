"""What a selector returns, and the base class of all selectors (docs/method.md, "The contract").

A selector sees tensors, never a model, a file or a config: this module imports torch alone.

Shape letters: B batch, N source tokens, T selected tokens, K kept tokens, D width.
"""

import copy
import inspect
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from shirg.budget import Budget, BudgetShare, ParsedBudget, count_on, matched_count_B, most_pooled, parse_budget
from shirg.features import Geometry, TokenLayout, VisionFeatures
from shirg.taps import with_taps
from shirg.validation import OptionBlock, UserError, assert_finite

Stage = Literal["pre", "post"]


class Source(IntEnum):
    """Where a selected token comes from."""

    KEPT = 0
    SCAFFOLD = 1
    SUMMARY = 2
    MERGED = 3
    NEWLINE = 4
    """A row end: the prefix puts the model's learned newline vector here."""


@dataclass(frozen=True, eq=False)
class Selection:
    """T tokens per picture, in the order in which the language model reads them.

    T depends on the configuration and the layout alone. Where a picture needs fewer, `mask_BT` is False.
    """

    tokens_BTD: Tensor
    index_BT: Tensor
    """int64: the source token, -1 when the token is synthesised (pooled, scaffold, summary, newline)."""
    source_BT: Tensor
    """int64: a `Source`."""
    box_BT4: Tensor
    """float32: the token's box (x0, y0, x1, y1), as fractions of the original picture."""
    mask_BT: Tensor
    """bool: False for slots that this picture does not use."""
    scores_BN: Tensor | None = None
    """float32: what the tokens were ranked by, for overlays."""
    expected_B: Tensor | None = None
    """float32: the loss that a trained head predicts for this selection; it carries the head's gradient."""

    def __repr__(self) -> str:
        """Sizes, and how many tokens of each source the pictures use; this waits for the device."""
        used_S = {}
        for source in Source:
            counts = ((self.source_BT == int(source)) & self.mask_BT).sum(-1).tolist()
            if any(counts):
                least, most = min(counts), max(counts)
                used_S[source.name.lower()] = str(least) if least == most else f"{least} to {most}"
        parts = ", ".join(f"{count} {name}" for name, count in used_S.items()) or "none"
        return f"Selection(tokens {list(self.tokens_BTD.shape)} {self.tokens_BTD.dtype}, used: {parts})"


def stable_topk(scores_BN: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest scores, best first; equal scores go to the lower index on every device."""
    return torch.sort(scores_BN, dim=-1, descending=True, stable=True).indices[:, :k]


def gather_tokens(tokens_BND: Tensor, index_BT: Tensor) -> Tensor:
    """Rows of `tokens_BND` by index [B, T]; differentiable in the tokens."""
    b, n, d = tokens_BND.shape
    # Whole rows of the flat table: several times faster on a CPU than gather with an expanded index.
    row_BT = index_BT + n * torch.arange(b, device=index_BT.device)[:, None]
    return tokens_BND.reshape(b * n, d).index_select(0, row_BT.flatten()).view(b, -1, d)


class Selector(nn.Module):
    """Chooses which vision tokens the language model reads.

    A simple method overrides `score` alone; this class owns validation, the stable top-K, reading order and the gather.
    Constructors take keywords only, so that an unknown option is a TypeError.
    """

    stage: Stage = "pre"
    """Whether `features.tokens_BND` are encoder states ("pre") or projected states ("post")."""
    needs: frozenset[str] = frozenset()
    """Names of the taps that the tower must record for this selector."""
    uses_relevance: bool = False
    """True when `features.relevance_BN` must be given."""
    geometry: Geometry = "lavida_tiles"
    """How the adapter has to cut pictures into views for this selector."""
    reads_sample: bool = False
    """True when `ids` or `boxes` matter: prompts about one picture then cannot share a selection."""
    may_use_less: bool = False
    """True when a picture may use fewer tokens than its budget; `may_use_less_on` says on which layouts."""

    def __init__(self, *, budget: Budget | None, geometry: Geometry = "lavida_tiles") -> None:
        """`budget`: tokens per picture; "matched": as many as the base model uses; None: the method itself decides.

        "base" and a share such as "3/4 base" follow the base model's nominal number, which the layout knows.
        """
        super().__init__()
        if geometry not in get_args(Geometry):
            raise UserError(f"geometry={geometry!r}: choose one of {', '.join(get_args(Geometry))}")
        self.geometry = geometry
        self.budget: ParsedBudget | None = None if budget is None else parse_budget(budget)
        if isinstance(self.budget, BudgetShare) and self.budget.name != "base":
            raise UserError(f"budget={budget!r}: give a positive number of tokens, 'matched', 'base' or '3/4 base'")

    @property
    def inner(self) -> "Selector":
        """The selector whose layers an adapter trains, and names: itself, or the one that it wraps."""
        return self

    def may_use_less_on(self, layout: TokenLayout, *, padding: bool = True) -> bool:
        """Whether a picture with this layout may use fewer tokens than its budget.

        `padding`: whether some of its tokens are padding. A global view has none where there are tiles beside it.
        """
        return self.may_use_less

    def at_budget(self, budget: int) -> Self:
        """This selector at another budget in numbers; the parameters are shared."""
        other = copy.copy(self)
        other.budget = budget
        return other

    def embed(self, selection: Selection) -> Selection:
        """The selection with what this selector's own layers add to each of its tokens; here they add nothing."""
        return selection

    def option(self, name: str, default: Any) -> Any:
        """The value of an option of the constructor, kept under its name; the default where it is not kept."""
        return getattr(self, name, default)

    def __repr__(self) -> str:
        """The class, and the options that differ from their defaults."""
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        shown = [
            f"{p.name}={value!r}"
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and not _is_default(value := self.option(p.name, p.default), p.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def score(self, features: VisionFeatures) -> Tensor:
        """Scores [B, N] in float32; larger is kept first."""
        raise NotImplementedError(f"{type(self).__name__} must override score or select")

    def select(self, features: VisionFeatures) -> Selection:
        """The default: the best tokens by `score`, in reading order."""
        k, keep_B = self.resolve_budget(features)
        valid_BN, order_N = features.valid_BN, features.layout.order_N
        scores_BN = self.score(features).float().detach()
        assert_finite(scores_BN, valid_BN, type(self).__name__)
        best_first = stable_topk(scores_BN.masked_fill(~valid_BN, float("-inf"))[:, order_N], k)
        keep_B = torch.minimum(keep_B, valid_BN.sum(-1))
        return keep(features, order_N[best_first], keep_B, scores_BN=scores_BN)

    def forward(self, features: VisionFeatures) -> Selection:
        if self.uses_relevance and features.relevance_BN is None:
            raise UserError(
                f"{type(self).__name__} ranks by relevance, and these features have none: pass relevance=, one number "
                "per token (of cosine_relevance or saliency, for example)"
            )
        if features.layout.geometry != self.geometry:
            raise UserError(
                f"{type(self).__name__} is for geometry={self.geometry}, the features are of {features.layout.geometry}"
            )
        return self.select(with_taps(features, self.needs, type(self).__name__))

    def resolve_budget(self, features: VisionFeatures) -> tuple[int, Tensor]:
        """The static T for this layout and the count [B] that each picture uses; they differ only for "matched"."""
        layout = features.layout
        if self.budget is None:
            raise UserError(f"{type(self).__name__} has no budget: override select, or pass budget= to Selector")
        count = count_on(self.budget, layout)
        if count == "matched":
            return min(most_pooled(layout), layout.n_tokens), matched_count_B(features).clamp_max(layout.n_tokens)
        self.check_count(features, count)
        return count, torch.full_like(features.size_B2[:, 0], count)

    def check_count(self, features: VisionFeatures, wanted: int) -> None:
        """Raises UserError when a picture has fewer tokens than `wanted`."""
        total = features.layout.n_tokens
        if wanted > total:
            raise UserError(
                f"{type(self).__name__}: budget {wanted} is larger than the {total} vision tokens of a canvas of "
                f"{features.layout.n_views} views; lower the budget"
            )
        for sample, n in zip(features.ids, features.n_valid, strict=True):
            if n < wanted:
                raise UserError(
                    f"{type(self).__name__}: budget {wanted} is larger than the {n} tokens of picture {sample!r} that "
                    "are not padding; lower the budget, or let it follow the picture with budget='matched'"
                )


def _is_default(value: Any, default: Any) -> bool:
    """Whether an option has its default; a group of options may be None for all of its defaults."""
    return bool(value == default) or (default is None and isinstance(value, OptionBlock) and value == type(value)())


def keep(features: VisionFeatures, ranked_BT: Tensor, keep_B: Tensor, *, scores_BN: Tensor | None = None) -> Selection:
    """A Selection of source tokens given best first: the first `keep_B` of each row are kept, in reading order."""
    layout, t = features.layout, ranked_BT.shape[1]
    used_BT = torch.arange(t, device=ranked_BT.device) < keep_B[:, None]
    rank_BT = layout.rank_N[ranked_BT].masked_fill(~used_BT, layout.n_tokens)
    order_BT = torch.sort(rank_BT, dim=-1, stable=True).indices
    index_BT, mask_BT = ranked_BT.gather(1, order_BT), used_BT.gather(1, order_BT)
    return Selection(
        tokens_BTD=gather_tokens(features.tokens_BND, index_BT) * mask_BT[..., None].to(features.tokens_BND.dtype),
        index_BT=index_BT.masked_fill(~mask_BT, -1),
        source_BT=torch.full_like(index_BT, int(Source.KEPT)),
        box_BT4=gather_tokens(features.box_BN4(), index_BT),
        mask_BT=mask_BT,
        scores_BN=scores_BN,
    )


def join(*parts: Selection) -> Selection:
    """Selections one after the other; the scores are those of the last."""
    names = ("tokens_BTD", "index_BT", "source_BT", "box_BT4", "mask_BT")
    return replace(parts[-1], **{name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in names})
