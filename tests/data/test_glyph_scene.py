"""Glyph scenes: deterministic, disjoint between splits, and with the content that docs/method.md describes."""

import subprocess
import sys
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from experiments.data.synthetic.glyphs import GlyphScene, draw_patchwork, draw_scene, render, scene
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS, FIRST_FOIL, FIRST_LETTER, FOILS, LETTERS

SPLITS = ("train", "val", "test")
PINNED = {
    ("train", "train"): 4902089859870838727,
    ("val", "dense"): 4388347147029842185,
    ("test", "sparse"): 797190066455063094,
    ("test", "hard"): 8376585836213546995,
}


def is_digit(s: GlyphScene) -> np.ndarray:
    return (s.char_RC > 0) & (s.char_RC < FIRST_LETTER)


def shape_mask(s: GlyphScene) -> np.ndarray:
    mask = np.zeros((16, 16), dtype=bool)
    for shape in s.shapes:
        mask[shape.row : shape.row + 4, shape.col : shape.col + 4] = True
    return mask


def test_scenes_are_pinned() -> None:
    """Other scenes mean other test sets and useless weights: a change here needs a new VERSION and new weights."""
    drawn = {(split, density): draw_scene(0, split, 3, density).digest for split, density in PINNED}
    assert drawn == PINNED
    assert draw_patchwork(0, 3).digest == 8149727906803916511


def test_every_argument_changes_the_scene() -> None:
    arguments = [(0, "test", 0, "dense"), (1, "test", 0, "dense"), (0, "test", 1, "dense"), (0, "val", 0, "dense")]
    assert len({draw_scene(*a).digest for a in arguments}) == len(arguments)


def test_another_process_draws_the_same() -> None:
    code = (
        "from experiments.data.synthetic.glyphs import draw_patchwork as p, draw_scene as d, render as r;"
        "from hashlib import sha256 as h;"
        "print(h(r(d(5, 'val', 7, 'hard')).tobytes() + r(p(5, 7)).tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    here = render(draw_scene(5, "val", 7, "hard")).tobytes() + render(draw_patchwork(5, 7)).tobytes()
    assert done.stdout.strip() == sha256(here).hexdigest()


def test_splits_are_disjoint_by_construction() -> None:
    seen = {split: {draw_scene(s, split, i, "sparse").digest for s in (0, 1) for i in range(60)} for split in SPLITS}
    for split, digests in seen.items():
        assert len(digests) == 120
        assert {d % 100 for d in digests} <= set(scene.BUCKETS[split])
    buckets = [bucket for split in SPLITS for bucket in scene.BUCKETS[split]]
    assert sorted(buckets) == list(range(100))


def test_the_hash_sees_content_and_nothing_else() -> None:
    s = draw_scene(0, "train", 0, "dense")
    assert GlyphScene(s.char_RC, s.colour_RC, s.shapes, look=s.look + 1).digest == s.digest
    (shape,) = s.shapes
    moved = scene.BigShape(shape.kind, shape.colour, shape.row ^ 2, shape.col)
    assert GlyphScene(s.char_RC, s.colour_RC, (moved,), look=s.look).digest != s.digest
    char_RC = s.char_RC.copy()
    char_RC[0, 0] += 1
    assert GlyphScene(char_RC, s.colour_RC, s.shapes, look=s.look).digest != s.digest


def test_a_split_without_buckets_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scene.BUCKETS, "test", range(0))
    scene._accepted.cache_clear()
    with pytest.raises(ValueError, match="no scene of split 'test' in 1000 draws"):
        draw_scene(0, "test", 0, "sparse")


@pytest.mark.parametrize("density", scene.DENSITIES)
def test_content(density: str) -> None:
    for index in range(40):
        s = draw_scene(2, "train", index, density)
        assert len(s.shapes) == 1
        assert not (s.char_RC[shape_mask(s)] > 0).any()
        assert not (s.colour_RC[s.char_RC == 0] > 0).any()
        coloured_digits = is_digit(s) & (s.colour_RC > 0)
        assert sorted(s.colour_RC[coloured_digits]) == list(range(1, len(COLOURS)))
        n = int((s.char_RC > 0).sum())
        if density == "hard":
            assert n == 8 + 12 + 100
            assert (s.colour_RC[s.char_RC > 0] > 0).all()
            assert int(coloured_digits.sum()) == int(is_digit(s).sum()) == 8
        else:
            letters = s.char_RC[(s.char_RC >= FIRST_LETTER) & (s.colour_RC > 0)]
            assert sorted(CHARS[c] for c in letters) == sorted(LETTERS)
            assert s.char_RC.max() < FIRST_FOIL
            assert {"sparse": n == 28, "dense": n == 128, "train": 28 <= n <= 128}[density]


def test_train_pictures_have_every_crowd_size() -> None:
    gray = [int((s.char_RC > 0).sum()) - 28 for s in (draw_scene(0, "train", i, "train") for i in range(300))]
    assert min(gray) < 5 and max(gray) > 95
    assert abs(np.mean(gray) - 50) < 6


def test_hard_distractors_have_many_types_and_never_repeat_a_key() -> None:
    for index in range(30):
        s = draw_scene(0, "train", index, "hard")
        counts = Counter(CHARS[c] for c in s.char_RC[s.char_RC >= FIRST_LETTER])
        keys = {char for char in counts if counts[char] == 1}
        assert len(keys) == 12 and keys <= set(LETTERS)
        distractors = {char: n for char, n in counts.items() if char not in keys}
        assert set(distractors) == {*LETTERS, *FOILS} - keys
        assert len(distractors) == 24 and set(distractors.values()) == {4, 5}


def test_digits_fill_whole_pooling_blocks() -> None:
    for index in range(40):
        s = draw_scene(0, "train", index, "dense")
        in_block = (is_digit(s) & (s.colour_RC > 0)).reshape(8, 2, 8, 2).sum(axis=(1, 3))
        assert sorted(in_block[in_block > 0]) == [4, 4]


def test_letters_are_in_crowded_blocks() -> None:
    shares = Counter[int]()
    for index in range(60):
        s = draw_scene(0, "train", index, "sparse")
        in_block = ((s.char_RC >= FIRST_LETTER) & (s.colour_RC > 0)).reshape(8, 2, 8, 2).sum(axis=(1, 3))
        shares.update(int(n) for n in in_block[in_block > 0])
    assert set(shares) == {2, 4}  # a row of four takes half of two blocks
    assert 4 * shares[4] > 2 * shares[2]


def test_answers_are_balanced() -> None:
    digits, colours, kinds, shades = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
    n = 400
    for index in range(n):
        s = draw_scene(0, "test", index, "sparse")
        digits.update(map(int, s.char_RC[is_digit(s)]))
        colours.update(map(int, s.colour_RC[s.char_RC >= FIRST_LETTER]))
        kinds[s.shapes[0].kind] += 1
        shades[s.shapes[0].colour] += 1
    for counts, classes in ((digits, 10), (colours, 8), (kinds, 3), (shades, 8)):
        assert len(counts) == classes
        expected = counts.total() / classes
        assert all(abs(count - expected) < 4.5 * expected**0.5 for count in counts.values())


def test_patchworks_show_every_char_colour_and_shape() -> None:
    scenes = [draw_patchwork(0, i) for i in range(30)]
    assert set(np.concatenate([s.char_RC.ravel() for s in scenes])) == set(range(len(CHARS)))
    assert set(np.concatenate([s.colour_RC.ravel() for s in scenes])) == set(range(len(COLOURS)))
    assert {shape.kind for s in scenes for shape in s.shapes} == {1, 2, 3}
    assert {len(s.shapes) for s in scenes} == {1, 2, 3}
    for s in scenes:
        assert not (s.char_RC[shape_mask(s)] > 0).any()
    named = [draw_patchwork(0, i, foil_share=0.0) for i in range(5)]
    assert max(s.char_RC.max() for s in named) < FIRST_FOIL


def test_scenes_cannot_be_changed() -> None:
    """They are cached and shared between samples."""
    with pytest.raises(ValueError, match="read-only"):
        draw_scene(0, "train", 0, "sparse").char_RC[0, 0] = 1
