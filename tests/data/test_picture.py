"""Picture files of every kind become upright RGB, or a sentence that names the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data.image_io import load_picture


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


def test_32_bit_samples_are_refused(tmp_path: Path) -> None:
    Image.new("F", (2, 2), 0.5).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff: .*32 bits \(mode F\); save it with 8 bits a channel"):
        load_picture(tmp_path / "x.tiff")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("limit", "refused"), [(99, True), (49, True), (100, False), (None, False)])
def test_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, refused: bool) -> None:
    """Both what Pillow only warns about (up to twice the limit) and what it refuses itself."""
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if refused:
        with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture .*pixels"):
            load_picture(tmp_path / "x.png")
    else:
        assert load_picture(tmp_path / "x.png").size == (10, 10)
