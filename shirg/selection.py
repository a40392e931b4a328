"""The contract between a vision tower, a selector and a prefix (docs/method.md, "The contract").

A selector sees tensors, never a model, a file or a config: this module imports torch alone.

Shape letters: B batch, V views, N source tokens, T selected tokens, K kept tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

Budget = int | Literal["matched"]
Stage = Literal["pre", "post"]
Geometry = Literal["lavida_tiles", "seed_canvas48", "single_672", "single_512", "fovea"]
"""How a picture is cut into views (docs/method.md, "Geometries")."""


class Role(IntEnum):
    """What a source token's view shows."""

    GLOBAL = 0
    """The whole picture, squashed into one view."""
    TILE = 1
    """One cell of the canvas; tiles do not overlap."""
    CROP = 2
    """A window of the canvas that may overlap others."""


class Source(IntEnum):
    """Where a selected token comes from."""

    KEPT = 0
    SCAFFOLD = 1
    SUMMARY = 2
    MERGED = 3
    NEWLINE = 4
    """A row end: the prefix puts the model's learned newline vector here."""


@dataclass(frozen=True)
class Pooling:
    """How the base model itself shrinks its views; the yardstick of every budget (docs/lavida.md, "Pooling")."""

    side: int
    """A view of n x n tokens becomes side x side."""
    mode: Literal["bilinear", "average", "max"] = "bilinear"
    merge: Literal["spatial_unpad", "flat"] = "spatial_unpad"
    most: int | None = None
    """The base model's largest count over its own canvases; None where the layout is itself one of them."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where each of the N source tokens of one canvas kind sits. Static: the same for every picture on that canvas.

    Frames: a GLOBAL token is placed in the picture (the global view is the picture, squashed); a TILE or CROP token is
    placed on the canvas, where `VisionFeatures.picture_B4` says which part is picture and which is letterbox padding.
    """

    view_N: Tensor
    """int64: index of the view."""
    role_N: Tensor
    """int64: a `Role`."""
    cell_N2: Tensor
    """int64: (row, column) in the view for GLOBAL, on the canvas for TILE and CROP."""
    centre_N2: Tensor
    """float32: (x, y) of the token's centre as a fraction of its frame."""
    size_N2: Tensor
    """float32: (width, height) of the token as a fraction of its frame."""
    canvas: tuple[int, int]
    """(rows, columns) of the canvas in cells; (0, 0) when there is only a global view."""
    side: int
    """Tokens per side of one view."""
    pooling: Pooling
    canvas_px: tuple[int, int]
    """(height, width) of the canvas in pixels; the size of the single view when there are no tiles."""
    geometry: Geometry = "lavida_tiles"
    """Which way of cutting this is; a selector refuses any other than its own."""
    rank_N: Tensor = field(init=False)
    """int64: place of each token in reading order: global view first, then the canvas row by row."""
    order_N: Tensor = field(init=False)
    """int64: the token at each place; the inverse of `rank_N`."""
    n_global: int = field(init=False)
    """How many tokens the global view has; the places after them are the canvas."""
    derived: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    """Tables that selectors compute from the layout, kept as long as it is; a weak map would vanish under a tracer."""
    overlaps: bool = field(init=False)
    """Whether several tokens share a canvas cell."""

    def __post_init__(self) -> None:
        # A layout outlives the call that built it, so its tensors must be usable in training and inference alike.
        with torch.inference_mode(False):
            is_global = self.role_N.cpu() == int(Role.GLOBAL)
            row, col = self.cell_N2.cpu().to(torch.int64).unbind(-1)
            width = max(self.side, self.canvas[1])
            key = row * width + col + torch.where(is_global, 0, width * max(self.side, self.canvas[0]))
            order = torch.argsort(key, stable=True)
            object.__setattr__(self, "order_N", order.to(self.view_N.device))
            object.__setattr__(self, "rank_N", torch.argsort(order).to(self.view_N.device))
            object.__setattr__(self, "n_global", int(is_global.sum()))
            object.__setattr__(self, "overlaps", bool((torch.sort(key).values.diff() == 0).any()))

    @property
    def n_tokens(self) -> int:
        return self.view_N.shape[0]

    @property
    def n_views(self) -> int:
        return self.n_tokens // (self.side * self.side)

    def to(self, device: torch.device | str) -> Self:
        target = torch.device(device)
        here = self.view_N.device
        if here.type == target.type and target.index in (None, here.index):
            return self
        with torch.inference_mode(False):
            given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
            moved: dict[str, Any] = {k: v.to(target) if isinstance(v, Tensor) else v for k, v in given.items()}
            return type(self)(**moved)


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """What the vision tower says about B pictures that share one canvas kind."""

    tokens_BND: Tensor
    """Encoder states for a selector of stage "pre", projected states for stage "post"."""
    layout: TokenLayout
    valid_BN: Tensor
    """bool: False where the token's centre lies in letterbox padding."""
    picture_B4: Tensor
    """float32: the picture's box (x0, y0, x1, y1) as fractions of the canvas."""
    size_B2: Tensor
    """int64: (width, height) of the original picture in pixels."""
    ids: tuple[str, ...]
    """Stable sample ids: the only seed a random control may use."""
    n_valid: tuple[int, ...]
    """Valid tokens per picture, known on the host, so that no selector has to wait for the device."""
    relevance_BN: Tensor | None = None
    base_count_B: Tensor | None = None
    """int64: what the base model itself would feed for each picture; None where that follows from the layout."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Extra recordings that the selector asked for by name in `needs`; "encoder" is the pre-projector states."""
    boxes: tuple[tuple[tuple[float, float, float, float], ...], ...] | None = None
    """Where the evidence of each sample is, as fractions of the picture: for an oracle, and for nobody else."""

    def box_BN4(self) -> Tensor:
        """Each token's box (x0, y0, x1, y1) as fractions of the original picture; outside [0, 1] in padding."""
        half = self.layout.size_N2 / 2
        box_N4 = torch.cat([self.layout.centre_N2 - half, self.layout.centre_N2 + half], dim=-1)
        origin = self.picture_B4[:, None, :2]
        extent = self.picture_B4[:, None, 2:] - origin
        on_canvas = (box_N4[None] - origin.repeat(1, 1, 2)) / extent.repeat(1, 1, 2)
        if self.layout.canvas == (0, 0):  # a single view carries its own padding
            return on_canvas
        is_global = (self.layout.role_N == int(Role.GLOBAL))[None, :, None]
        return torch.where(is_global, box_N4[None], on_canvas)

    def __getitem__(self, rows: slice) -> Self:
        """The features of some of the pictures."""
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "taps":
                picked[f.name] = {k: v[rows] for k, v in value.items()}
            else:
                picked[f.name] = value if f.name == "layout" or value is None else value[rows]
        return replace(self, **picked)


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
    """float32: where the token sits, as fractions of the original picture."""
    mask_BT: Tensor
    """bool: False for slots that this picture does not use."""
    scores_BN: Tensor | None = None
    """float32: what the tokens were ranked by, for overlays."""
    expected_B: Tensor | None = None
    """float32: the loss that a trained head expects of this choice; it carries the head's gradient."""


def assert_finite(scores_BN: Tensor, valid_BN: Tensor, who: str) -> None:
    """Raises RuntimeError when a usable token has no finite score; on a GPU without waiting for the device."""
    torch._assert_async(
        (scores_BN.isfinite() | ~valid_BN).all(),
        f"{who}: the score of a token is not finite; look for NaN, inf or values beyond 1e18 in features and relevance",
    )


def stable_topk(scores_BN: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest scores, best first; equal scores go to the lower index on every device."""
    return torch.sort(scores_BN, dim=-1, descending=True, stable=True).indices[:, :k]


def gather_tokens(tokens_BND: Tensor, index_BT: Tensor) -> Tensor:
    """Rows of `tokens_BND` by index [B, T]; differentiable in the tokens."""
    b, n, d = tokens_BND.shape
    # Whole rows of the flat table: several times faster on a CPU than gather with an expanded index.
    row_BT = index_BT + n * torch.arange(b, device=index_BT.device)[:, None]
    return tokens_BND.reshape(b * n, d).index_select(0, row_BT.flatten()).view(b, -1, d)


def matched_count_B(features: VisionFeatures) -> Tensor:
    """How many tokens [B] the base model itself would feed for each picture, whatever the geometry is."""
    layout = features.layout
    if layout.geometry == "lavida_tiles":
        return pooled_count_B(layout, features.size_B2)
    if features.base_count_B is None:
        raise ValueError(
            f"budget=matched on geometry={layout.geometry} needs VisionFeatures.base_count_B, the base model's count"
        )
    return features.base_count_B


def most_pooled(layout: TokenLayout) -> int:
    """The largest `matched_count_B` of this layout."""
    pooling = layout.pooling
    if pooling.most is not None:
        return min(pooling.most, layout.n_tokens)
    flat = layout.n_views * pooling.side**2
    if pooling.merge == "flat":
        return flat
    rows = 1 if layout.canvas == (0, 0) else layout.canvas[0] // layout.side * pooling.side
    return min(flat + rows, layout.n_tokens)


def pooled_count_B(layout: TokenLayout, size_B2: Tensor) -> Tensor:
    """How many tokens [B] the base model itself would feed for each picture, newlines included.

    Float64 and the order of operations decide borderline pictures (docs/lavida.md, "Unpadding").
    """
    area = layout.pooling.side**2
    if layout.pooling.merge == "flat":
        return torch.full_like(size_B2[:, 0], layout.n_views * area)
    if layout.canvas == (0, 0):
        return torch.full_like(size_B2[:, 0], layout.n_views * area + 1)
    top, bottom, left, right = unpad_bounds(layout, size_B2)
    rows, cols = (bottom - top).clamp_min(0), (right - left).clamp_min(0)
    return torch.where(cols > 0, area + rows * (cols + 1), torch.full_like(rows, area))


def unpad_bounds(layout: TokenLayout, size_B2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last+1 kept row and column [B] of the pooled mosaic: top, bottom, left, right."""
    side = layout.pooling.side
    rows, cols = layout.canvas[0] // layout.side * side, layout.canvas[1] // layout.side * side
    w, h = size_B2[:, 0].double(), size_B2[:, 1].double()
    wide = w / h > cols / rows
    new_h = torch.trunc(h * (cols / w)).to(torch.int64)
    new_w = torch.trunc(w * (rows / h)).to(torch.int64)
    pad_y = torch.where(wide, (rows - new_h) // 2, torch.zeros_like(new_h))
    pad_x = torch.where(wide, torch.zeros_like(new_w), (cols - new_w) // 2)
    return pad_y, rows - pad_y, pad_x, cols - pad_x


class Selector(nn.Module):
    """Chooses which vision tokens the language model reads.

    A simple method overrides `score` alone; this class owns validation, the stable top-K, reading order and the gather.
    Constructors take keywords only, so that an unknown knob is a TypeError.
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
    """True when `ids` or `boxes` matter: prompts about one picture then get a selection each, whatever ranks."""
    may_use_less: bool = False
    """True when a picture may use fewer tokens than its budget."""

    def __init__(self, *, budget: Budget | None, geometry: Geometry = "lavida_tiles") -> None:
        """`budget`: tokens per picture; "matched": as many as the base model; None: the method itself decides."""
        super().__init__()
        if geometry not in get_args(Geometry):
            raise ValueError(f"geometry={geometry!r}: choose one of {', '.join(get_args(Geometry))}")
        self.geometry = geometry
        is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
        if not (budget is None or budget == "matched" or is_count):
            raise ValueError(f"budget={budget!r}: give a positive number of tokens or 'matched'")
        self.budget: Budget | None = budget

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
            raise ValueError(
                f"{type(self).__name__} ranks by relevance to the question, but no relevance was computed: "
                "choose relevance=lm_embed, none or external"
            )
        if features.layout.geometry != self.geometry:
            raise ValueError(
                f"{type(self).__name__} is for geometry={self.geometry}, the features are of {features.layout.geometry}"
            )
        missing = self.needs - set(features.taps)
        if missing:
            raise ValueError(f"{type(self).__name__} needs the taps {sorted(missing)}, which the tower did not record")
        return self.select(features)

    def resolve_budget(self, features: VisionFeatures) -> tuple[int, Tensor]:
        """The static T for this layout and the count [B] that each picture uses; they differ only for "matched"."""
        layout = features.layout
        if self.budget is None:
            raise ValueError(f"{type(self).__name__} has no budget: override select, or pass budget= to Selector")
        if self.budget == "matched":
            return most_pooled(layout), matched_count_B(features).clamp_max(layout.n_tokens)
        self.check_count(features, self.budget)
        return self.budget, torch.full_like(features.size_B2[:, 0], self.budget)

    def check_count(self, features: VisionFeatures, wanted: int) -> None:
        """Raises when a picture has fewer tokens than the budget asks for."""
        total = features.layout.n_tokens
        if wanted > total:
            raise ValueError(
                f"{type(self).__name__}: budget {wanted} is larger than the {total} vision tokens of a canvas of "
                f"{features.layout.n_views} views; lower budget= or use budget=matched"
            )
        for sample, n in zip(features.ids, features.n_valid, strict=True):
            if n < wanted:
                raise ValueError(
                    f"{type(self).__name__}: budget {wanted} is larger than the {n} tokens of picture {sample!r} that "
                    "are not padding; lower budget= or use budget=matched"
                )


def keep(features: VisionFeatures, ranked_BT: Tensor, keep_B: Tensor, *, scores_BN: Tensor | None = None) -> Selection:
    """A Selection of source tokens given best first: the first `keep_B` of each row stay, put into reading order."""
    layout, t = features.layout, ranked_BT.shape[1]
    used_BT = torch.arange(t, device=ranked_BT.device) < keep_B[:, None]
    place_BT = layout.rank_N[ranked_BT].masked_fill(~used_BT, layout.n_tokens)
    order_BT = torch.sort(place_BT, dim=-1, stable=True).indices
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
