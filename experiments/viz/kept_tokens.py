"""Draws what a selector kept on the picture: one overlay, a heat map of scores, or panels for several selectors."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.data.sample import Box
from experiments.token_stats import TokenGeometry, count_sources, recall
from shirg import Selection, Source

DARK = 0.16
COARSE = 0.3
EDGE_COLOUR = (86, 150, 255)
SCAFFOLD_COLOUR = (255, 176, 32)
OUTLINE = 0.45
"""How much of the frame of a scaffold token is colour; the rest is the picture."""
TARGET_COLOUR = (64, 224, 120)
GAP, LINE, TEXT = 14, 17, 13
MOST_PER_ROW = 5
PAPER, INK = (18, 18, 22), (226, 226, 230)
COLD_TO_HOT = np.array([(18, 10, 60), (110, 30, 130), (200, 60, 80), (250, 150, 40), (252, 250, 170)], dtype=np.float32)
HEAT = 0.75
"""How much of a heat map is colour; the rest is the picture in grey."""
LEGEND = (
    "Bright: kept tokens, coarse ones darker; dark: dropped tokens. Amber frames: scaffold and summary tokens. Green "
    "frames: where the answer is. Scores: by rank, from violet, low, to yellow, high."
)

BoxArray = Sequence[Sequence[float]]


def overlay(
    image: Image.Image,
    box_T4: BoxArray,
    source_T: Sequence[int],
    *,
    fine_area: float | None = None,
    targets: BoxArray = (),
    longest: int = 448,
) -> Image.Image:
    """The picture, bright where tokens were kept and dark where they were dropped.

    A token that is coarser than the finest one is darker, the more of the picture it covers: it has fewer pixels for
    the same area. Scaffold and summary tokens are only outlined, since they cover everything; newline tokens cover
    nothing.

    Args:
        image: RGB.
        box_T4: each token's (x0, y0, x1, y1) as fractions of the picture.
        source_T: each token's `shirg.Source`.
        fine_area: area of the finest token that this picture could have; by default the finest one given.
        targets: boxes of the evidence, outlined in green.
        longest: pixels of the result's longer side; the picture is scaled, up or down.
    """
    scale = longest / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    pixels = np.asarray(image.convert("RGB").resize((width, height), resample), dtype=np.float32)
    boxes = np.asarray(box_T4, dtype=np.float64).reshape(-1, 4)
    source = np.asarray(source_T, dtype=np.int64)
    lit = boxes[np.isin(source, (Source.KEPT, Source.MERGED))]
    area = (lit[:, 2] - lit[:, 0]) * (lit[:, 3] - lit[:, 1])
    finest = fine_area if fine_area is not None else area.min(initial=1.0)
    light = np.full((height, width), DARK, dtype=np.float32)
    for box, level in zip(lit, COARSE + (1 - COARSE) * np.sqrt(np.clip(finest / area, 0, 1)), strict=True):
        x0, y0, x1, y1 = _pixels(box, width, height)
        np.maximum(light[y0:y1, x0:x1], level, out=light[y0:y1, x0:x1])
    pixels *= light[..., None]
    # In a dark picture brightness is hard to see: a thin line marks the border between kept and dropped.
    kept = light > DARK
    edge = np.zeros_like(kept)
    edge[:, 1:] |= kept[:, 1:] != kept[:, :-1]
    edge[1:] |= kept[1:] != kept[:-1]
    pixels[edge] = 0.4 * pixels[edge] + 0.6 * np.asarray(EDGE_COLOUR)
    outline = np.zeros_like(kept)
    for box in boxes[np.isin(source, (Source.SCAFFOLD, Source.SUMMARY))]:
        x0, y0, x1, y1 = _pixels(box, width, height)
        outline[y0:y1, [x0, x1 - 1]] = outline[[y0, y1 - 1], x0:x1] = True
    # They lie over what was kept: the picture is seen through them.
    pixels[outline] = (1 - OUTLINE) * pixels[outline] + OUTLINE * np.asarray(SCAFFOLD_COLOUR)
    drawn = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for target in targets:
        x0, y0, x1, y1 = _pixels(np.asarray(target), width, height)
        pen.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=TARGET_COLOUR, width=2)
    return drawn


def _pixels(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Pixel bounds, at least one pixel wide, inside the picture."""
    x0, x1 = (min(max(round(float(x) * width), 0), width) for x in (box[0], box[2]))  # np.clip takes ten times as long
    y0, y1 = (min(max(round(float(y) * height), 0), height) for y in (box[1], box[3]))
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


Panel = tuple[str, Image.Image | None]
"""A caption and the picture under it."""


@dataclass(frozen=True)
class PanelChoice:
    """A selector's name and its selection."""

    selector: str
    selection: Selection


def draw_panels(
    image: Image.Image,
    title: str,
    choices: Sequence[PanelChoice],
    geometry: TokenGeometry,
    *,
    boxes: Sequence[Box] = (),
    longest: int = 448,
) -> Image.Image:
    """The picture first, then a column for each selector: kept tokens above, heat map of its scores below."""
    columns: list[list[Panel]] = [
        [("the picture", overlay(image, [(0, 0, 1, 1)], [Source.KEPT], targets=boxes, longest=longest)), (LEGEND, None)]
    ]
    for choice in choices:
        kept = kept_map(image, choice.selection, geometry, boxes, longest)
        scores_BN = choice.selection.scores_BN
        heat = None if scores_BN is None else heat_map(image, scores_BN[0], geometry, longest=longest)
        below: Panel = ("scores of the tiles", heat) if heat is not None else ("no scores: it does not rank", None)
        columns.append([(describe(choice, geometry, image.size, boxes), kept), below])
    return _compose(title, columns)


def describe(choice: PanelChoice, geometry: TokenGeometry, size: tuple[int, int], boxes: Sequence[Box]) -> str:
    """Token counts, and how much of the evidence was kept where that is known."""
    selection = choice.selection
    sources = {name: count for name, count in count_sources(selection).items() if count}
    counts = ", ".join(f"{count} {name}" for name, count in sources.items())
    text = f"{choice.selector}: {sum(sources.values())} tokens ({counts})"
    used_T = selection.mask_BT[0] & (selection.source_BT[0] == Source.KEPT)
    share = recall(boxes, selection.index_BT[0][used_T], geometry, size)
    return text if share is None else f"{text}; {share:.0%} of the target's tokens kept"


def kept_map(
    image: Image.Image, selection: Selection, geometry: TokenGeometry, boxes: Sequence[Box], longest: int
) -> Image.Image:
    """The picture, bright where the selection of one picture (B = 1) kept tokens."""
    used_T = selection.mask_BT[0]
    return overlay(
        image,
        selection.box_BT4[0][used_T].float().cpu().tolist(),
        selection.source_BT[0][used_T].cpu().tolist(),
        fine_area=geometry(image.size).fine_area,
        targets=boxes,
        longest=longest,
    )


def heat_map(image: Image.Image, score_N: Tensor, geometry: TokenGeometry, *, longest: int = 448) -> Image.Image | None:
    """The tile tokens' scores, by rank from dark to bright, over the grey picture; None without a finite one."""
    placed = geometry(image.size)
    score_N = score_N.float().cpu()
    shown_N = placed.eligible_N & score_N.isfinite()
    if not bool(shown_N.any()):
        return None
    scale = longest / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32)[..., None]
    pixels = np.repeat(grey, 3, axis=2)
    values = score_N[shown_N].numpy()
    # By rank: a few outliers would make everything else dark. Equal scores have the same colour.
    ranks = np.searchsorted(np.sort(values), values, side="left") / max(len(values) - 1, 1)
    colours = np.stack([np.interp(ranks * 4, range(5), COLD_TO_HOT[:, c]) for c in range(3)], axis=1)
    edges = np.array([width, height, width, height])
    corners = np.clip(np.rint(placed.box_N4[shown_N].numpy() * edges), 0, edges).astype(int)
    for (x0, y0, x1, y1), colour in zip(corners, colours, strict=True):
        pixels[y0:y1, x0:x1] = (1 - HEAT) * pixels[y0:y1, x0:x1] + HEAT * colour
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _compose(title: str, columns: Sequence[Sequence[Panel]]) -> Image.Image:
    """Columns of captioned pictures under a title, in rows of equal length that are as high as their pictures."""
    width = max([240, *(picture.width for column in columns for _, picture in column if picture is not None)])
    font = ImageFont.load_default(TEXT)
    letters = max(8, int(width / (0.56 * TEXT)))
    across = _across(len(columns))
    head = textwrap.wrap(title, max(8, int((width + GAP) * across / (0.56 * TEXT))))
    placed: list[tuple[int, int, int, list[str], Image.Image | None]] = []
    y = len(head) * LINE + 2 * GAP
    for start in range(0, len(columns), across):
        for panels in zip_longest(*columns[start : start + across]):
            captions = [textwrap.wrap(panel[0], letters) if panel else [] for panel in panels]
            pictures = [panel[1] if panel else None for panel in panels]
            both = list(zip(captions, pictures, strict=True))
            below = LINE * max((len(caption) for caption, picture in both if picture is not None), default=0)
            placed += [(GAP + i * (width + GAP), y, below, *one) for i, one in enumerate(both)]
            y += GAP + max(below + picture.height if picture else LINE * len(caption) for caption, picture in both)
    paper = Image.new("RGB", (GAP + across * (width + GAP), y), PAPER)
    pen = ImageDraw.Draw(paper)
    pen.multiline_text((GAP, GAP), "\n".join(head), INK, font, spacing=LINE - TEXT)
    for x, top, below, caption, picture in placed:
        pen.multiline_text((x, top), "\n".join(caption), INK, font, spacing=LINE - TEXT)
        if picture is not None:
            paper.paste(picture, (x, top + below))
    return paper


def _across(columns: int) -> int:
    """Columns in a row: at most MOST_PER_ROW; the fewest empty panels first, then the fewest rows."""
    fewest = min(columns, 3)
    return min(range(fewest, min(columns, MOST_PER_ROW) + 1), key=lambda across: (-columns % across, -across))
