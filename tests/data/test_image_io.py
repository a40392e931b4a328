"""Picture files of every kind become upright RGB, and worker processes make the same views of them as this one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.image_io import PictureFile, ViewBatches, load_batch, load_picture, prefetch_pictures
from experiments.data.sample import Sample
from lavida_adapter.views import Views, cut, ready
from shirg import UserError
from tests.lavida_adapter.tiny import tiny_config


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 0x4D4D, (77, 77, 77)),
        ("I;16", 0xFFFF, (255, 255, 255)),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    path = tmp_path / "x.png"
    Image.new(mode, (3, 2), colour).save(path)  # type: ignore[arg-type]
    picture = load_picture(path)
    assert picture.mode == "RGB" and picture.size == (3, 2)
    assert picture.getpixel((1, 1)) == expected


def test_palettes(tmp_path: Path) -> None:
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([200, 0, 0, 0, 0, 200])
    indexed.putdata([0, 1])
    indexed.save(tmp_path / "opaque.png")
    indexed.save(tmp_path / "clear.png", transparency=1)
    opaque, clear = load_picture(tmp_path / "opaque.png"), load_picture(tmp_path / "clear.png")
    assert [opaque.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (0, 0, 200)]
    assert [clear.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue = load_picture(tmp_path / "x.jpg").getpixel((1, 1))  # type: ignore[misc]
    assert red > 200 and green < 60 and blue < 60


def test_exif_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = np.asarray(load_picture(tmp_path / "x.jpg"))
    assert upright.shape == (16, 8, 3)
    assert upright[:7].min() > 240 and upright[9:].max() < 15


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_picture(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_a_file_cut_in_half_names_itself(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"x\.{suffix}: cannot be read as a picture .*; replace it"):
        load_picture(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        load_picture(tmp_path / "x.png")


def test_what_is_no_picture_is_said_without_an_address(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"\(it is in no format that Pillow knows\); replace it or remove its rows$"):
        load_batch([sample(tmp_path, "x.png", "?")])


def test_a_program_is_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    with pytest.raises(UserError, match="it is PostScript, which only a program that runs it could draw"):
        load_picture(tmp_path / "x.eps")


def test_one_transparent_colour_of_16_bits(tmp_path: Path) -> None:
    grey = np.array([[0x0101, 0x0102, 0xFFFF]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=0x0101)
    assert np.asarray(load_picture(tmp_path / "grey.png")).tolist() == [[[255] * 3, [1] * 3, [255] * 3]]


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("limit", "refused"), [(99, True), (49, True), (100, False), (None, False)])
def test_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, refused: bool) -> None:
    """Both what Pillow only warns about (up to twice the limit) and what it refuses itself."""
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if refused:
        with pytest.raises(ValueError, match=r"x\.png: has more than 0 megapixels; shrink it"):
            load_picture(tmp_path / "x.png")
    else:
        assert load_picture(tmp_path / "x.png").size == (10, 10)


def sample(folder: Path, name: str, question: str) -> Sample:
    return Sample(
        id=f"{name}-{question}",
        dataset="d",
        split="test",
        load_image=PictureFile(folder / name),
        size=None,
        question=question,
        prompt=question,
        answers=("1",),
        meta={"picture": name},
    )


@pytest.fixture
def batches(tmp_path: Path) -> list[list[Sample]]:
    """Two pictures in three batches; the first batch asks twice about one of them."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("a.png", (40, 90, 3)), ("b.png", (70, 30, 3))):
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
    asked = [["a.png", "a.png", "b.png"], ["b.png"], ["a.png"]]
    return [[sample(tmp_path, name, str(i)) for i, name in enumerate(names)] for names in asked]


def test_workers_make_the_views_that_this_process_makes(batches: list[list[Sample]], tmp_path: Path) -> None:
    """A picture that cannot be read is the error of its own batch, in its own sentence."""
    config = tiny_config()
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    coming = prefetch_pictures([*batches, [sample(tmp_path, "broken.png", "?")]], config, "lavida_tiles", workers=1)
    found: list[Sequence[object]] = []
    for batch in batches:
        pictures = next(coming)
        assert pictures is not None and len(pictures.pictures) == len(batch)
        found.append(pictures.pictures)
        loaded = load_batch(batch)
        assert loaded.digests == pictures.digests
        for image, views in zip(loaded.pictures, pictures.pictures, strict=True):
            assert isinstance(image, Image.Image) and isinstance(views, Views) and views.size == image.size
            expected, there = cut(image, config, "lavida_tiles"), ready(views, config, "lavida_tiles")
            assert torch.equal(there.pixels_V3SS, expected.pixels_V3SS) and torch.equal(there.valid_N, expected.valid_N)
            assert there.layout is expected.layout and there.picture_4 == expected.picture_4
    assert found[0][0] is found[0][1] and found[0][0] is not found[0][2], "one picture is one object"
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as a picture .*; replace it or remove its rows$"):
        next(coming)


def test_a_worker_returns_errors(batches: list[list[Sample]], tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"not a picture")
    views = ViewBatches(batches, tiny_config(), "lavida_tiles")
    assert isinstance(views[1], UserError) and not isinstance(views[2], Exception) and len(views) == 3


def test_without_workers_nothing_is_loaded(batches: list[list[Sample]]) -> None:
    assert list(prefetch_pictures(batches, tiny_config(), "lavida_tiles", workers=0)) == [None] * 3
