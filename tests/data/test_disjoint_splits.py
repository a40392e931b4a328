"""No picture of one split is in another: every synthetic family, by the pixels without their noise."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from experiments.data.synthetic import board, glyphs
from experiments.data.synthetic.board import Board
from experiments.data.synthetic.entitygrid import EntityGrid
from experiments.data.synthetic.glyphs import GlyphScene, SynthGlyphs, SynthList, draw_scene
from experiments.data.synthetic.glyphs.scene import draw_patchwork
from experiments.data.synthetic.mixture import FAMILIES

SPLITS = ("train", "val", "test")
DRAWN: dict[str, Any] = {"glyphs": SynthGlyphs, "list": SynthList, **FAMILIES}
N = 360
"""Questions of a split."""


def plain(scene: Board | GlyphScene) -> npt.NDArray[np.uint8]:
    """What a scene shows: without the jitter, the noise and the order of drawing, which differ in equal scenes."""
    if isinstance(scene, GlyphScene):
        return glyphs.render(replace(scene, look=0))
    stamps = sorted(scene.stamps, key=lambda stamp: (stamp.row, stamp.col))
    return board.render(replace(scene, stamps=tuple(stamps), look=0))


def digest(picture: npt.NDArray[np.uint8]) -> str:
    return sha256(picture.tobytes()).hexdigest()


def asked(family: str, split: str) -> Iterator[tuple[str, str]]:
    """Picture and question of each sample."""
    if family == "entitygrid":
        # No noise, and nothing but entities is drawn.
        grid = EntityGrid(
            split=split, suffix="", max_new_tokens=16, metrics=(), canvas=(384, 384), sizes=(28, 42), entities=12
        )
        for sample in (grid[i] for i in range(len(grid))):
            yield digest(np.asarray(sample.load_image())), sample.question
        return
    densities = "sparse,dense" if family in FAMILIES else "sparse,dense,hard"
    data = DRAWN[family](split=split, n=N, density=densities, qa_per_image=3)
    draw = data.draw if family in FAMILIES else draw_scene
    pictures = [digest(plain(draw(*data._scene(i)))) for i in range(N // 3)]
    for i in range(N):
        yield pictures[i // 3], data[i].question


@pytest.mark.parametrize("family", [*DRAWN, "entitygrid"])
def test_no_picture_with_its_question_is_in_two_splits(family: str) -> None:
    found = {split: set(asked(family, split)) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert min(len(found[one]), len(found[other])) > 0.9 * N
        assert not found[one] & found[other]
        assert not {picture for picture, _ in found[one]} & {picture for picture, _ in found[other]}


def test_equal_content_has_equal_pixels_here() -> None:
    scene = draw_patchwork(0, 0)
    assert digest(plain(scene)) == digest(plain(replace(scene, look=scene.look + 1)))
    assert digest(glyphs.render(scene)) != digest(glyphs.render(replace(scene, look=scene.look + 1)))
    for family in FAMILIES.values():
        drawn = family.draw(0, "val", 0, "dense")
        shuffled = replace(drawn, stamps=drawn.stamps[::-1], look=drawn.look + 1)
        assert digest(plain(drawn)) == digest(plain(shuffled))
