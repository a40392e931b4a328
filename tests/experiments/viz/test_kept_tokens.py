"""Overlays: bright where tokens were kept; heat maps and panels of several selectors."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.token_stats import TokenGeometry
from experiments.viz.kept_tokens import (
    COARSE,
    COLD_TO_HOT,
    DARK,
    EDGE_COLOUR,
    OUTLINE,
    SCAFFOLD_COLOUR,
    TARGET_COLOUR,
    PanelChoice,
    describe,
    draw_panels,
    heat_map,
    overlay,
)
from lavida_adapter import LavidaConfig, VisionConfig
from shirg import Selection, Source

TOY = LavidaConfig(vision=VisionConfig(16, 32, 2, 2, 64, 8), image_grid_pinpoints=((128, 128),))
WHITE = Image.new("RGB", (128, 128), (255, 255, 255))


def test_overlay_lights_what_was_kept() -> None:
    """White, 4 x 4 cells: a fine token, one four times as large, a scaffold over the last quarter."""
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    boxes = [(0, 0, 0.25, 0.25), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1), (1, 0, 1, 1)]
    sources = [Source.KEPT, Source.MERGED, Source.SCAFFOLD, Source.NEWLINE]
    drawn = np.asarray(overlay(white, boxes, sources, longest=64)).astype(int)
    assert drawn.shape == (64, 64, 3)
    assert drawn[8, 8].tolist() == [255] * 3
    assert drawn[16, 48].tolist() == [int(255 * (COARSE + (1 - COARSE) * 0.5))] * 3
    assert drawn[48, 8].tolist() == drawn[48, 48].tolist() == [int(255 * DARK)] * 3
    seen_through = [int((1 - OUTLINE) * 255 * DARK + OUTLINE * c) for c in SCAFFOLD_COLOUR]
    assert np.abs(drawn[[48, 63], [32, 63]] - seen_through).max() <= 1
    # The border between kept and dropped is drawn, whatever the picture's own colour is there.
    black = np.asarray(overlay(Image.new("RGB", (64, 64)), boxes[:1], sources[:1], longest=64)).astype(int)
    assert black[8, 16].tolist() == [int(0.6 * c) for c in EDGE_COLOUR]
    assert black[8, 8].tolist() == black[40, 40].tolist() == [0, 0, 0]


def test_overlay_outlines_the_evidence_and_scales() -> None:
    drawn = overlay(Image.new("RGB", (30, 60)), [], [], targets=[(0.5, 0.5, 0.75, 0.75)], longest=120)
    assert drawn.size == (60, 120)
    pixels = np.asarray(drawn)
    assert pixels[58, 30].tolist() == list(TARGET_COLOUR)
    assert pixels[62, 32].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1)])
def test_overlay_survives_odd_pictures(size: tuple[int, int]) -> None:
    drawn = overlay(Image.new("RGB", size), [(0, 0, 1, 1), (0.999, 0.999, 1.2, 1.2)], [Source.KEPT] * 2)
    assert max(drawn.size) == 448 and min(drawn.size) >= 1


def chosen(index: list[int], scores: torch.Tensor | None = None) -> Selection:
    """Tokens of the toy layout: a quarter of the picture as scaffold, then these."""
    box_N4 = TokenGeometry(TOY)((128, 128)).box_N4
    boxes = torch.cat([torch.tensor([[0.5, 0.5, 1.0, 1.0]]), box_N4[index]])
    source = [int(Source.SCAFFOLD)] + [int(Source.KEPT)] * len(index)
    return Selection(
        tokens_BTD=torch.zeros(1, len(source), 4),
        index_BT=torch.tensor([[-1, *index]]),
        source_BT=torch.tensor([source]),
        box_BT4=boxes[None],
        mask_BT=torch.ones(1, len(source), dtype=torch.bool),
        scores_BN=scores,
    )


def test_counts_and_retention() -> None:
    geometry = TokenGeometry(TOY)
    # The target is the top left tile's first 2 x 2 cells: tokens 64, 65, 72, 73.
    text = describe(PanelChoice("x", chosen([64, 65, 73, 200])), geometry, (128, 128), [(0, 0, 0.125, 0.125)])
    assert text == "x: 5 tokens (4 kept, 1 scaffold); 75% of the target's tokens kept"
    assert describe(PanelChoice("x", chosen([64])), geometry, (128, 128), []) == "x: 2 tokens (1 kept, 1 scaffold)"


def test_the_best_tile_is_hottest_where_it_sits() -> None:
    geometry = TokenGeometry(TOY)
    scores = torch.arange(320.0)
    scores[64 + 9] = 1000  # second row and column of the first tile: pixels 8 to 16
    scores[:64] = float("-inf")
    drawn = heat_map(WHITE, scores, geometry, longest=128)
    assert drawn is not None and drawn.size == (128, 128)
    pixels = np.asarray(drawn).astype(int)
    assert np.abs(pixels[12, 12] - (0.25 * 255 + 0.75 * COLD_TO_HOT[-1])).max() <= 1
    assert np.abs(pixels[2, 2] - (0.25 * 255 + 0.75 * COLD_TO_HOT[0])).max() <= 1
    assert heat_map(WHITE, torch.full((320,), float("nan")), geometry) is None


def test_panels_have_a_column_for_each_selector_and_wraps() -> None:
    geometry, scored = TokenGeometry(TOY), torch.randn(1, 320)
    few = draw_panels(WHITE, "t", [PanelChoice("a", chosen([64], scored))], geometry, longest=240)
    many = draw_panels(WHITE, "t", [PanelChoice("a", chosen([64], scored))] * 5, geometry, longest=240)
    assert few.width == 14 + 2 * 254 and many.width == 14 + 3 * 254
    assert many.height > 1.8 * few.height


def test_panels_leave_little_empty() -> None:
    """Few empty panels in the last row, and no room for heat maps in a row of selectors without scores."""
    geometry, scored = TokenGeometry(TOY), torch.randn(1, 320)
    ranked, plain = PanelChoice("a", chosen([64], scored)), PanelChoice("b", chosen([64]))

    def size(*choices: PanelChoice) -> tuple[int, int]:
        return draw_panels(WHITE, "t", choices, geometry, longest=240).size

    across = [(size(*[ranked] * n)[0] - 14) // 254 for n in range(1, 11)]
    assert across == [2, 3, 4, 5, 3, 4, 4, 3, 5, 4]
    (_, all_ranked), (_, last_plain) = size(*[ranked] * 7), size(*[ranked] * 3, *[plain] * 4)
    assert all_ranked - last_plain == 240, "as high as one heat map; the words under it stay"
