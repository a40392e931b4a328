"""Picture files to RGB. One rule for every dataset, so that the same file always gives the same pixels."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from shirg import UserError

WIDE_MODES = ("I", "F")
"""32-bit samples, whose white is anyone's guess."""


def load_picture(path: Path) -> Image.Image:
    """The picture upright, in RGB; transparency becomes white, an animation its first frame.

    A picture beyond `PIL.Image.MAX_IMAGE_PIXELS` is refused: Pillow only warns about some of them.
    """
    return _load(path, str(path))


def read_picture(data: bytes, where: str) -> Image.Image:
    """`load_picture` for a file that a table holds; `where` names it in messages."""
    return _load(io.BytesIO(data), where)


def _load(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        with Image.open(file) as picture:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and picture.width * picture.height > limit:
                raise Image.DecompressionBombError(
                    f"{picture.width}x{picture.height} is more than {limit} pixels; "
                    "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
                )
            return to_rgb(ImageOps.exif_transpose(picture))
    # Decoders of broken files raise whatever they trip over: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise UserError(f"{where}: cannot be read as a picture ({error}); replace it or remove its rows") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A decoded picture in RGB, transparency turned white; ValueError where its white is anyone's guess."""
    if picture.mode in WIDE_MODES:
        raise UserError(f"its samples have 32 bits (mode {picture.mode}); save it with 8 bits a channel")
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion differs between versions: some clip, which turns most 16-bit pictures white.
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
