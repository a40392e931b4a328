"""Rendered glyph pictures: reproducible, legible, and labelled with what they show."""

import numpy as np
import pytest

from experiments.data.synthetic.glyphs import GlyphScene, draw_patchwork, draw_scene, labels, render, to_image
from experiments.data.synthetic.glyphs.render import GLYPHS
from experiments.data.synthetic.glyphs.scene import CHARS, COLOUR_RGB, FIRST_FOIL, SHAPES, BigShape


def cells(picture: np.ndarray) -> np.ndarray:
    """[16, 16, 8, 8, 3] in [0, 1]."""
    return picture.reshape(16, 8, 16, 8, 3).transpose(0, 2, 1, 3, 4) / 255


def scene_with(**changes: object) -> GlyphScene:
    blank = np.zeros((16, 16), dtype=np.uint8)
    content: dict[str, object] = {"char_RC": blank, "colour_RC": blank, "shapes": (), "look": 7}
    return GlyphScene(**{**content, **changes})  # type: ignore[arg-type]


def test_pictures_are_reproducible_and_noise_has_its_own_seed() -> None:
    s = draw_scene(0, "train", 0, "dense")
    assert np.array_equal(render(s), render(s))
    assert np.array_equal(np.asarray(to_image(s)), render(s))
    other = GlyphScene(s.char_RC, s.colour_RC, s.shapes, look=s.look + 1)
    assert not np.array_equal(render(s), render(other))
    assert render(s).shape == (128, 128, 3) and render(s).dtype == np.uint8


def test_noise() -> None:
    noise = render(scene_with()) / 255
    assert noise.mean() == pytest.approx(0.1, abs=0.005)
    assert noise.std() == pytest.approx(0.05, abs=0.003)


def test_glyphs_are_distinct() -> None:
    assert GLYPHS.shape == (len(CHARS), 7, 5)
    assert not GLYPHS[0].any() and GLYPHS[1:].any(axis=(1, 2)).all()
    differing = (GLYPHS[:, None] != GLYPHS[None]).sum(axis=(2, 3)) + 99 * np.eye(len(CHARS), dtype=int)
    assert differing[1:FIRST_FOIL, 1:FIRST_FOIL].min() >= 3
    assert differing.min() >= 2


@pytest.mark.parametrize("density", ["dense", "hard"])
def test_every_glyph_can_be_read_where_the_scene_says(density: str) -> None:
    """Matching each cell against every bitmap at every place finds the char, and the ink has the colour."""
    s = draw_scene(0, "val", 4, density)
    rgb = np.array([(0.5, 0.5, 0.5), *COLOUR_RGB.values()])
    places = [(y, x) for y in range(2) for x in range(4)]
    for row, col in np.argwhere(s.char_RC > 0):
        cell = cells(render(s))[row, col]
        ink = cell.max(axis=-1)
        error = np.full((len(CHARS), len(places)), np.inf)
        for char in range(1, len(CHARS)):
            for place, (y, x) in enumerate(places):
                expected = np.full((8, 8), 0.14)
                expected[y : y + 7, x : x + 5][GLYPHS[char]] = rgb[s.colour_RC[row, col]].max()
                error[char, place] = np.square(ink - expected).sum()
        best = np.unravel_index(error.argmin(), error.shape)
        assert best[0] == s.char_RC[row, col]
        y, x = places[best[1]]
        colour = cell[y : y + 7, x : x + 5][GLYPHS[best[0]]].mean(axis=0)
        assert np.square(rgb - colour).sum(axis=1).argmin() == s.colour_RC[row, col]


def test_glyphs_move_about_in_their_cells() -> None:
    char_RC = np.full((16, 16), CHARS.index("T"), dtype=np.uint8)
    ink = cells(render(scene_with(char_RC=char_RC))).max(axis=-1) > 0.33
    first_row, first_col = ink.any(axis=3).argmax(axis=2), ink.any(axis=2).argmax(axis=2)
    assert set(first_row.ravel()) == {0, 1}
    assert set(first_col.ravel()) == {0, 1, 2, 3}


def test_shapes_are_big_dim_and_differ_in_area() -> None:
    area = {}
    for kind in (1, 2, 3):
        picture = render(scene_with(shapes=(BigShape(kind=kind, colour=1, row=4, col=8),)))
        red = picture[..., 0] / 255 > 0.28
        area[SHAPES[kind]] = int(red[32:64, 64:96].sum())
        assert red.sum() - area[SHAPES[kind]] < 5  # noise alone reaches that far now and then
        assert area[SHAPES[kind]] > 300
        assert picture[red][:, 0].mean() / 255 == pytest.approx(0.45 * COLOUR_RGB["red"][0], abs=0.02)
    assert area["square"] > area["circle"] * 1.05 > area["triangle"] * 1.5


def test_labels_of_a_scene() -> None:
    s = draw_scene(0, "train", 1, "hard")
    found = labels(s)
    assert found.char_RC.dtype == found.colour_RC.dtype == found.shape_RC.dtype == np.int64
    named = s.char_RC < FIRST_FOIL
    assert np.array_equal(found.char_RC[named], s.char_RC[named])
    assert not found.char_RC[~named].any() and found.colour_RC[~named].all()
    (shape,) = s.shapes
    box = np.zeros((16, 16), dtype=bool)
    box[shape.row : shape.row + 4, shape.col : shape.col + 4] = True
    assert np.array_equal(found.colour_RC[~box], s.colour_RC[~box])
    assert not found.shape_RC[~box].any()
    assert set(found.shape_RC[box]) <= {0, shape.kind} and shape.kind in found.shape_RC[box]


def test_only_cells_that_show_the_shape_are_labelled_with_it() -> None:
    covered = {
        SHAPES[kind]: int((labels(scene_with(shapes=(BigShape(kind, 2, 0, 0),))).shape_RC > 0).sum())
        for kind in (1, 2, 3)
    }
    assert covered == {"square": 16, "circle": 16, "triangle": 12}
    empty = labels(scene_with(shapes=(BigShape(3, 2, 0, 0),)))
    assert empty.shape_RC[0, 0] == 0 and empty.colour_RC[0, 0] == 0


def test_patchworks_can_be_drawn_and_labelled() -> None:
    s = draw_patchwork(1, 2)
    assert render(s).shape == (128, 128, 3)
    assert labels(s).shape_RC.max() > 0
