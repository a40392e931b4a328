"""What a selector kept, drawn on the picture; `python -m experiments.report.overlay` draws one of your own."""

import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from shirg import Source

DARK = 0.16
COARSE = 0.3
EDGE_COLOUR = (86, 150, 255)
SCAFFOLD_COLOUR = (255, 176, 32)
TARGET_COLOUR = (64, 224, 120)

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

    A token coarser than the finest one is lit the less, the more of the picture it covers: it saw fewer pixels.
    Scaffold and summary tokens are outlined, not lit, since they cover everything; newlines have no place.

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
    # A dark picture hides what is bright: where kept meets dropped, a thin line says so.
    kept = light > DARK
    edge = np.zeros_like(kept)
    edge[:, 1:] |= kept[:, 1:] != kept[:, :-1]
    edge[1:] |= kept[1:] != kept[:-1]
    pixels[edge] = 0.4 * pixels[edge] + 0.6 * np.asarray(EDGE_COLOUR)
    drawn = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for box in boxes[np.isin(source, (Source.SCAFFOLD, Source.SUMMARY))]:
        x0, y0, x1, y1 = _pixels(box, width, height)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=SCAFFOLD_COLOUR)
    for target in targets:
        x0, y0, x1, y1 = _pixels(np.asarray(target), width, height)
        pen.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=TARGET_COLOUR, width=2)
    return drawn


def _pixels(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Pixel bounds, at least one pixel wide, inside the picture."""
    x0, x1 = (int(np.clip(round(x * width), 0, width)) for x in (box[0], box[2]))
    y0, y1 = (int(np.clip(round(y * height), 0, height)) for y in (box[1], box[3]))
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


if __name__ == "__main__":
    from experiments.report.look import main

    main(sys.argv[1:])
