"""A picture's tokens for the page: what token_layer.js needs to name the token under the pointer, and the pictures of
`experiments.viz` that it lies on.

Shape letters: N source tokens of the picture, T selected tokens.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from PIL import Image

from experiments.data.sample import Box
from experiments.token_stats import TokenGeometry, TokenPlaces
from experiments.viz.kept_tokens import heat_map, kept_map, overlay
from shirg import Selection, Source

LONGEST = 768
"""Pixels of a picture's longer side on the page."""
QUALITY = 88
PARTS = 10_000
"""Coordinates are whole numbers of this many to a side."""


class TokenKind(IntEnum):
    """What token_layer.js calls a token; its list of names has this order."""

    KEPT = 0
    DROPPED = 1
    SCAFFOLD = 2
    SUMMARY = 3
    MERGED = 4


KIND_OF = {Source.SCAFFOLD: TokenKind.SCAFFOLD, Source.SUMMARY: TokenKind.SUMMARY, Source.MERGED: TokenKind.MERGED}

TokenRow = list[int | float | None]
"""[x0, y0, x1, y1, kind, number, view, role, score, rank]: corners in parts of PARTS; a source token's number, or how
many of its kind come before; view and role are -1, score and rank None where there are none; rank 1 is the largest."""


def kept_numbers(selection: Selection) -> frozenset[int]:
    """The source tokens that a selection of one picture keeps."""
    kept_T = selection.mask_BT[0] & (selection.source_BT[0] == Source.KEPT) & (selection.index_BT[0] >= 0)
    return frozenset(selection.index_BT[0][kept_T].tolist())


def token_rows(selection: Selection, places: TokenPlaces) -> list[TokenRow]:
    """Every token of a picture: source tokens, unless the selector only makes new ones, then synthesised ones."""
    kept = kept_numbers(selection)
    rows = _source_rows(selection, places, kept) if kept else []
    counts = dict.fromkeys(TokenKind, 0)
    used_T = selection.mask_BT[0].tolist()
    for used, source, box in zip(used_T, selection.source_BT[0].tolist(), selection.box_BT4[0].tolist(), strict=True):
        kind = KIND_OF.get(Source(source))
        if used and kind is not None:
            rows.append([*_corners(box), int(kind), counts[kind], -1, -1, None, None])
            counts[kind] += 1
    return rows


def _source_rows(selection: Selection, places: TokenPlaces, kept: frozenset[int]) -> list[TokenRow]:
    numbers = torch.nonzero(places.valid_N)[:, 0].tolist()
    scores, ranks = _ranked(selection, places)
    layout = places.layout
    view_N, role_N, box_N4 = layout.view_N.tolist(), layout.role_N.tolist(), places.box_N4.tolist()
    rows: list[TokenRow] = []
    for n in numbers:
        kind = TokenKind.KEPT if n in kept else TokenKind.DROPPED
        rows.append([*_corners(box_N4[n]), int(kind), n, view_N[n], role_N[n], scores.get(n), ranks.get(n)])
    return rows


def _ranked(selection: Selection, places: TokenPlaces) -> tuple[dict[int, float], dict[int, int]]:
    """Score and rank by source token, of those that were ranked: a score of -inf is none."""
    if selection.scores_BN is None:
        return {}, {}
    score_N = selection.scores_BN[0].float().cpu()
    score_N = score_N.masked_fill(~places.valid_N, float("-inf"))
    order = [n for n in score_N.argsort(descending=True, stable=True).tolist() if score_N[n].isfinite()]
    scores = score_N.tolist()
    return {n: float(f"{scores[n]:.4g}") for n in order}, {n: i + 1 for i, n in enumerate(order)}


def _corners(box: Sequence[float]) -> list[int | float | None]:
    return [round(PARTS * min(max(edge, 0.0), 1.0)) for edge in box]


@dataclass(frozen=True)
class PictureView:
    """One way of looking at a selection."""

    caption: str
    source: str | None
    """A data URI; None where there is nothing to see but the picture itself."""


def picture_views(
    image: Image.Image,
    selection: Selection,
    geometry: TokenGeometry,
    boxes: Sequence[Box],
    shared: Mapping[str, frozenset[int]],
) -> dict[str, PictureView]:
    """The views of one selector by name: kept, scores, scaffold, and one for each set of source tokens in `shared`.

    Args:
        boxes: where the answer is; drawn in green.
    """
    places = geometry(image.size)
    heat = None if selection.scores_BN is None else heat_map(image, selection.scores_BN[0], geometry, longest=LONGEST)
    used_T = selection.mask_BT[0]
    outlined_T = used_T & ((selection.source_BT[0] == Source.SCAFFOLD) | (selection.source_BT[0] == Source.SUMMARY))
    outlines = selection.box_BT4[0][outlined_T].tolist()
    lit = [(0.0, 0.0, 1.0, 1.0), *outlines]
    frames = overlay(image, lit, [Source.KEPT, *[Source.SCAFFOLD] * len(outlines)], targets=boxes, longest=LONGEST)
    views = {
        "kept": PictureView(
            "kept tokens bright, coarse ones darker; dropped ones dark",
            data_uri(kept_map(image, selection, geometry, boxes, LONGEST)),
        ),
        "scores": PictureView(
            "scores by rank, from violet (low) to yellow (high)" if heat else "no scores: this selector does not rank",
            None if heat is None else data_uri(heat),
        ),
        "scaffold": PictureView(
            f"{len(outlines)} scaffold and summary tokens" if outlines else "no scaffold: this selector has none",
            data_uri(frames) if outlines else None,
        ),
    }
    for name, numbers in shared.items():
        views[name] = _numbered(image, places, sorted(numbers), boxes, name)
    return views


def _numbered(
    image: Image.Image, places: TokenPlaces, numbers: Sequence[int], boxes: Sequence[Box], name: str
) -> PictureView:
    """Some source tokens, bright."""
    caption = {"all": "kept by every selector", "only": "kept by this selector alone"}[name]
    tokens = places.box_N4[list(numbers)].tolist()
    drawn = overlay(
        image, tokens, [Source.KEPT] * len(tokens), fine_area=places.fine_area, targets=boxes, longest=LONGEST
    )
    return PictureView(f"{len(tokens)} tokens {caption}", data_uri(drawn))


def plain_view(image: Image.Image, boxes: Sequence[Box]) -> str:
    """The picture itself, with the boxes of the answer."""
    return data_uri(overlay(image, [(0.0, 0.0, 1.0, 1.0)], [Source.KEPT], targets=boxes, longest=LONGEST))


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
