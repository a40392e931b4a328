"""Views and layouts: LaViDa's own at true geometry, then the other geometries and what of them reaches the prefix."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lavida_adapter import LavidaConfig
from lavida_adapter.views import (
    MOST_PADDED,
    SINGLE_VIEW,
    Views,
    cells_of,
    choose_canvas,
    content_key,
    cut,
    geometry_layout,
    letterbox_box,
    make_views,
    patch_pixels,
    pooled_count,
    ready,
)
from shirg import Geometry, Role, VisionFeatures
from tests.lavida_adapter.tiny import PATCH, picture, tiny_config

CONFIG = LavidaConfig()
CANVASES = {  # picture -> canvas (w, h), views
    (300, 300): ((384, 768), 3),
    (400, 800): ((384, 768), 3),
    (800, 400): ((768, 384), 3),
    (640, 480): ((768, 768), 5),
    (1920, 1080): ((768, 768), 5),
    (1000, 280): ((1152, 384), 4),
    (220, 900): ((384, 1152), 4),
}


def features(views: Views, tokens_ND: Tensor | None = None) -> VisionFeatures:
    tokens = torch.zeros(views.layout.n_tokens, 1) if tokens_ND is None else tokens_ND
    return VisionFeatures(
        tokens_BND=tokens[None],
        layout=views.layout,
        valid_BN=views.valid_N[None],
        picture_B4=torch.tensor([views.picture_4]),
        size_B2=torch.tensor([views.size]),
        ids=("0",),
        n_valid=(int(views.valid_N.sum()),),
    )


def patches(views: Views) -> Tensor:
    """Mean brightness [N] of the pixels that each token sees."""
    seen = 27 * 14
    grid = views.pixels_V3SS.mean(1)[:, :seen, :seen].unflatten(2, (27, 14)).unflatten(1, (27, 14))
    return grid.mean(dim=(2, 4)).flatten()


@pytest.mark.parametrize("size", CANVASES)
def test_canvases_views_and_tokens(size: tuple[int, int]) -> None:
    canvas, n_views = CANVASES[size]
    views = make_views(Image.new("RGB", size), CONFIG)
    layout = views.layout
    assert choose_canvas(size, CONFIG.image_grid_pinpoints) == canvas
    assert views.pixels_V3SS.shape == (n_views, 3, 384, 384)
    assert (layout.n_views, layout.n_tokens, layout.side) == (n_views, n_views * 729, 27)
    assert layout.canvas == (canvas[1] // 384 * 27, canvas[0] // 384 * 27)
    assert layout.canvas_px == canvas[::-1]
    assert (layout.role_N == Role.GLOBAL).sum() == 729
    assert views.size == size


def test_pictures_of_one_canvas_share_one_layout() -> None:
    """Pictures are grouped by it."""
    first, second, other = (make_views(Image.new("RGB", s), CONFIG) for s in ((640, 480), (768, 768), (1000, 280)))
    assert first.layout is second.layout
    assert first.layout is not other.layout


def test_base_view_is_the_squashed_picture_and_tiles_are_the_canvas_row_by_row() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8))
    views = make_views(image, CONFIG)
    uint8 = ((views.pixels_V3SS * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(uint8[0], np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC)))
    left, top, w, h = letterbox_box((900, 700), (768, 768))
    assert (left, top, w, h) == (0, 85, 768, 598)
    canvas = np.zeros((768, 768, 3), dtype=np.uint8)
    canvas[top : top + h, left : left + w] = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
    tiles = np.stack([canvas[y : y + 384, x : x + 384] for y in (0, 384) for x in (0, 384)])
    assert np.array_equal(uint8[1:], tiles)
    assert views.pixels_V3SS.dtype == torch.float32
    assert views.pixels_V3SS.min() == -1.0
    assert views.pixels_V3SS.max() == 1.0


@pytest.mark.parametrize(
    ("size", "n_tiles"),
    [
        ((768, 768), 2916),
        ((1700, 2200), 2268),
        ((640, 480), 2214),
        ((2480, 3508), 2052),
        ((1920, 1080), 1620),
        ((2000, 500), 1701),
        ((500, 375), 972),
        ((3000, 200), 405),
    ],
)
def test_valid_tile_tokens(size: tuple[int, int], n_tiles: int) -> None:
    """As many tile tokens as docs/lavida.md says, and just those whose centre pixel was pasted there."""
    views = make_views(Image.new("RGB", size, (255, 255, 255)), CONFIG)
    canvas_h, canvas_w = views.layout.canvas_px
    left, top, w, h = letterbox_box(size, (canvas_w, canvas_h))
    pasted = np.zeros((canvas_h, canvas_w), dtype=bool)
    pasted[top : top + h, left : left + w] = True
    for view, role, cell, valid in zip(
        views.layout.view_N.tolist(),
        views.layout.role_N.tolist(),
        views.layout.cell_N2.tolist(),
        views.valid_N.tolist(),
        strict=True,
    ):
        if role == Role.GLOBAL:
            assert valid
            continue
        tile_row, tile_col = divmod(view - 1, canvas_w // 384)
        y, x = (384 * t + 14 * (c - 27 * t) + 7 for t, c in zip((tile_row, tile_col), cell, strict=True))
        assert valid == pasted[y, x]
    assert views.valid_N.sum() == 729 + n_tiles


@pytest.mark.parametrize(("side", "first", "last"), [(378, 195, 573), (362, 203, 565)])
@pytest.mark.parametrize("upright", [True, False])
def test_a_centre_on_the_border_counts_on_the_left_and_top_alone(
    side: int, first: int, last: int, upright: bool
) -> None:
    """573 and 203 are centres of tokens: the first pixel behind the picture, and the first one in it."""
    size = (side, 768) if upright else (768, side)
    views = make_views(Image.new("RGB", size), replace(CONFIG, image_grid_pinpoints=((768, 768),)))
    centres = [384 * tile + 14 * i + 7 for tile in range(2) for i in range(27)]
    assert last in centres or first in centres
    lines = sum(first <= centre < last for centre in centres)
    assert views.valid_N.sum() == 729 + 54 * lines


def test_the_blind_margin() -> None:
    """No token covers the last six columns and rows of a tile: a gap in the middle of the canvas."""
    views = make_views(Image.new("RGB", (768, 768)), CONFIG)
    box_N4 = features(views).box_BN4()[0] * 768
    tile = views.layout.role_N == Role.TILE
    right_edges = box_N4[tile, 2].unique()
    assert right_edges[26] == pytest.approx(378)
    assert right_edges[27] == pytest.approx(398)
    assert box_N4[tile, 2].max() == pytest.approx(762)


@pytest.mark.parametrize("size", [(1000, 750), (300, 300), (1200, 320), (200, 850)])
def test_boxes_find_what_is_drawn_in_the_picture(size: tuple[int, int]) -> None:
    """A white rectangle: tokens whose box lies inside it see white, tokens away from it see black."""
    w, h = size
    rect = (int(0.2 * w), int(0.45 * h), int(0.7 * w), int(0.85 * h))
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), rect)
    views = make_views(image, CONFIG)
    bright_N = patches(views)
    x0, y0, x1, y1 = (features(views).box_BN4()[0] * torch.tensor([w, h, w, h])).unbind(-1)
    blur = 4 * max(w, h) / 384  # bicubic filters reach beyond the edge
    inside = (x0 > rect[0] + blur) & (x1 < rect[2] - blur) & (y0 > rect[1] + blur) & (y1 < rect[3] - blur)
    away = (x1 < rect[0] - blur) | (x0 > rect[2] + blur) | (y1 < rect[1] - blur) | (y0 > rect[3] + blur)
    for role in (Role.GLOBAL, Role.TILE):
        here = views.layout.role_N == role
        assert (inside & here).sum() >= 8
        assert (away & here).sum() >= 50
        assert bright_N[inside & here].min() > 0.99
        assert bright_N[away & here].max() < -0.99
    outside_picture = (x0 < 0) | (y0 < 0) | (x1 > w) | (y1 > h)
    assert not (outside_picture & views.valid_N & (views.layout.role_N == Role.GLOBAL)).any()


def test_pad_mode() -> None:
    config = replace(CONFIG, image_aspect_ratio="pad")
    views = make_views(Image.new("RGB", (400, 200), (255, 255, 255)), config)
    assert views.pixels_V3SS.shape == (1, 3, 384, 384)
    assert views.layout.canvas == (0, 0)
    grey = (127 / 255 - 0.5) / 0.5
    assert views.pixels_V3SS[0, :, :90].unique().tolist() == pytest.approx([grey])
    assert views.picture_4 == (0, 0.25, 1, 0.75)
    rows = views.valid_N.view(27, 27)
    assert (rows == rows[:, :1]).all()
    # Row r has its centre at 14 r + 7 pixels; the picture lies between 96 and 288.
    assert rows[:, 0].tolist() == [96 <= 14 * r + 7 < 288 for r in range(27)]
    box = features(views).box_BN4()[0].view(27, 27, 4)
    assert box[0, 0, 1] == pytest.approx(-0.5)
    assert box[13, 0].tolist() == pytest.approx([0, (182 - 96) / 192, 14 / 384, (196 - 96) / 192])
    bright = patches(views).view(27, 27)
    assert bright[8:20].min() > 0.99


@pytest.mark.parametrize(("size", "along"), [((1, 1000), 1), ((1000, 1), 0), ((3, 3000), 1), ((1, 60_000), 1)])
def test_a_strip_between_the_centres_has_the_tokens_that_it_crosses(size: tuple[int, int], along: int) -> None:
    """Centres are 14 pixels apart, and the one before the middle of the view, at 189 pixels, is the nearest."""
    views = make_views(Image.new("RGB", size, (255, 255, 255)), replace(CONFIG, image_aspect_ratio="pad"))
    assert views.layout.cell_N2[views.valid_N].tolist() == [[i, 13] if along else [13, i] for i in range(27)]
    # Crops of 48 x 48 cells without a global view: column or row 23, whose centre is at 329 of 672 pixels.
    crops = cut(Image.new("RGB", size), CONFIG, "seed_canvas48")
    cells = crops.layout.cell_N2[crops.valid_N]
    assert sorted(set(cells[:, 1 - along].tolist())) == list(range(48)) and set(cells[:, along].tolist()) == {23}
    assert len(cells) == 2 * 27 + 2 * 27 + 27, "every token of these cells, as elsewhere"


def test_a_strip_is_made_smaller_before_it_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame of a strip of 60,000 pixels would fill 10 GiB."""
    frames = []

    def new(mode: str, size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
        frames.append(size)
        return blank(mode, size, colour)

    blank, strip = Image.new, Image.new("RGB", (60_000, 60), (255, 255, 255))
    monkeypatch.setattr(Image, "new", new)
    views = make_views(strip, replace(CONFIG, image_aspect_ratio="pad"))
    edge = math.isqrt(MOST_PADDED)
    assert frames == [(edge, edge)] and edge**2 <= MOST_PADDED < (edge + 1) ** 2
    assert views.size == (60_000, 60)
    left, top, right, bottom = views.picture_4
    assert (left, right) == (0, 1) and bottom - top == pytest.approx(60 / 60_000, rel=0.1)


def test_several_pictures_a_prompt_are_padded() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    padded = make_views(image, replace(CONFIG, image_aspect_ratio="pad"))
    single = make_views(image, CONFIG, single=True)
    assert torch.equal(single.pixels_V3SS, padded.pixels_V3SS)
    assert single.layout is padded.layout


def test_resize_mode() -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    views = make_views(image, replace(CONFIG, image_aspect_ratio="resize"))
    assert torch.equal(views.pixels_V3SS, make_views(image, CONFIG).pixels_V3SS[:1])
    assert views.valid_N.all()
    assert views.picture_4 == (0, 0, 1, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3000, 60)])
def test_extreme_pictures(size: tuple[int, int]) -> None:
    views = make_views(Image.new("RGB", size, (255, 255, 255)), CONFIG)
    assert views.pixels_V3SS.isfinite().all()
    assert views.valid_N.sum() >= 729


GEOMETRIES: tuple[Geometry, ...] = ("seed_canvas48", "single_672", "single_512", "fovea")


def test_true_sizes() -> None:
    config = LavidaConfig()
    assert (cells_of(config.vision, (7, 4)), cells_of(config.vision, (7, 6))) == (48, 32)
    counts = {g: (geometry_layout(config, g).n_tokens, geometry_layout(config, g).canvas_px) for g in GEOMETRIES}
    assert counts == {
        "seed_canvas48": (3645, (672, 672)),
        "single_672": (2304, (672, 672)),
        "single_512": (1296, (504, 504)),
        "fovea": (2048, (448, 448)),
    }
    pooling = geometry_layout(config, "fovea").pooling
    assert pooling is not None and (pooling.least, pooling.most) == (196, 1008)
    flat, single = (replace(config, **own) for own in ({"mm_patch_merge_type": "flat"}, {"image_aspect_ratio": "pad"}))
    for other, least, most in ((flat, 3 * 196, 5 * 196), (single, 197, 197)):
        pooling = geometry_layout(other, "fovea").pooling
        assert pooling is not None and (pooling.least, pooling.most) == (least, most)


@pytest.mark.parametrize("size", [(384, 384), (640, 480), (1600, 900), (300, 1200)])
def test_views_at_true_size(size: tuple[int, int]) -> None:
    config, image = LavidaConfig(), picture(size)
    views = {geometry: cut(image, config, geometry) for geometry in GEOMETRIES}
    shapes = [tuple(v.pixels_V3SS.shape) for v in views.values()]
    assert shapes == [(5, 3, 384, 384), (1, 3, 672, 672), (1, 3, 504, 504), (2, 3, 448, 448)]
    assert all(bool(views[single].valid_N.all()) for single in SINGLE_VIEW)
    for v in views.values():
        assert v.size == size and v.base_count == pooled_count(size, config)
        px = v.layout.canvas_px[0]
        centre = (v.layout.centre_N2[v.layout.role_N != 0].double() * px).round(decimals=3)
        x0, y0, x1, y1 = (round(edge * px, 3) for edge in v.picture_4)
        inside = (centre[:, 0] >= x0) & (centre[:, 0] < x1) & (centre[:, 1] >= y0) & (centre[:, 1] < y1)
        assert torch.equal(inside, v.valid_N[v.layout.role_N != 0])


def test_tokens_of_one_cell_see_the_same_pixels() -> None:
    views = cut(picture((60, 44)), tiny_config(), "seed_canvas48")
    patches = patch_pixels(views.pixels_V3SS, views.layout)
    assert patches.shape == (45, 3, PATCH, PATCH)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    shared = 0
    for cell, patch in zip(views.layout.cell_N2.tolist(), patches, strict=True):
        if tuple(cell) in seen:
            shared += 1
            assert torch.equal(seen[tuple(cell)], patch)
        seen[tuple(cell)] = patch
    assert shared == 45 - 25


def test_padding_is_black_and_invalid() -> None:
    views = cut(Image.new("RGB", (60, 20), (255, 255, 255)), tiny_config(), "seed_canvas48")
    patches = patch_pixels(views.pixels_V3SS, views.layout)
    row = views.layout.cell_N2[:, 0]
    assert bool((patches[row == 0] == -1).all()) and not bool(views.valid_N[row == 0].any())
    assert bool((patches[row == 2] == 1).all()) and bool(views.valid_N[row == 2].all())


def test_the_fovea_is_the_middle_of_the_picture() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, 2)
    config = LavidaConfig()
    views = cut(Image.fromarray(ramp), config, "fovea")
    whole, middle = (views.pixels_V3SS[i, 0, 224] for i in (0, 1))
    assert whole[0] < -0.99 and whole[-1] > 0.99
    third = 2 * 256 / 6 / 255 - 1
    assert middle[0] == pytest.approx(third, abs=0.02) and middle[-1] == pytest.approx(-third, abs=0.02)
    assert views.picture_4 == pytest.approx((-0.25, -0.25, 1.25, 1.25))


def test_views_cut_ahead_of_time_are_those_cut_now_and_fit_their_geometry_alone() -> None:
    config, image = tiny_config(), picture((40, 30))
    for geometry in ("lavida_tiles", "single_672"):
        now = ready(image, config, geometry)
        for ahead in (cut(image, config, geometry), pickle.loads(pickle.dumps(now))):
            views = ready(ahead, config, geometry)
            assert views.layout is now.layout and torch.equal(views.pixels_V3SS, now.pixels_V3SS)
    for views in (cut(image, config, "fovea"), pickle.loads(pickle.dumps(cut(image, config, "fovea")))):
        with pytest.raises(ValueError, match="cut for another geometry than single_672"):
            ready(views, config, "single_672")


def test_a_picture_has_one_key_in_all_processes() -> None:
    """Of the picture or of its views; another picture, size, mode or place in the views gives another key."""
    config, image = tiny_config(), picture((40, 30))
    assert content_key(image) == content_key(image.copy()) != content_key(picture((40, 30), seed=1))
    grey = Image.new("RGB", (40, 30), (9, 9, 9))
    others = [grey, grey.transpose(Image.Transpose.ROTATE_90), Image.new("L", (120, 30), 9)]
    views = [cut(image, config, geometry) for geometry in ("lavida_tiles", "single_672", "fovea")]
    moved = [replace(views[0], size=(41, 30)), replace(views[0], picture_4=(0.0, 0.0, 1.0, 0.5))]
    assert len({content_key(one) for one in (*others, *views, *moved)}) == 8
    assert content_key(views[0]) == content_key(pickle.loads(pickle.dumps(cut(image.copy(), config, "lavida_tiles"))))
