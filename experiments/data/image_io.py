"""Pictures of samples: files to RGB, each loaded once for a batch, by worker processes where they are asked for.

One rule decodes the files of every dataset, so that the same file always gives the same pixels.
"""

import hashlib
import io
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader

from experiments.data.sample import Sample
from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter import LavidaConfig
    from lavida_adapter.views import Views
    from shirg import Geometry

WIDE_MODES = ("I", "F")
"""32-bit samples: their white level is unknown, so they are refused."""

Pictures = Sequence["Image.Image | Views"]
"""One for each sample; samples that share a picture share the object, and the tower runs once for it."""


def load_picture(path: Path) -> Image.Image:
    """The picture upright, in RGB; transparency becomes white, an animation its first frame.

    A picture beyond `PIL.Image.MAX_IMAGE_PIXELS` (89 megapixels) is refused: Pillow only warns about some of them.
    """
    return _load(path, str(path))


def read_picture(data: bytes, where: str) -> Image.Image:
    """`load_picture` for the bytes of a file; `where` names it in messages."""
    return _load(io.BytesIO(data), where)


def _load(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(file)
        with opened as picture:
            if picture.format == "EPS":
                raise UserError("it is PostScript, which only a program that runs it could draw")
            return to_rgb(ImageOps.exif_transpose(picture))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(f"{where}: has more than {most:.0f} megapixels; shrink it or remove its rows") from error
    except UnidentifiedImageError as error:
        raise _unreadable(where, "it is in no format that Pillow knows") from error
    # Decoders raise many kinds of errors for broken files: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception | str) -> UserError:
    return UserError(f"{where}: cannot be read as a picture ({error}); replace it or remove its rows")


def to_rgb(picture: Image.Image) -> Image.Image:
    """A decoded picture in RGB, transparency turned white.

    Raises:
        UserError: the picture has 32-bit samples.
    """
    if picture.mode in WIDE_MODES:
        raise UserError(f"its samples have 32 bits (mode {picture.mode}); save it with 8 bits a channel")
    transparent = picture.info.get("transparency")
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion differs between versions: some clip, which turns most 16-bit pictures white.
        wide = picture.convert("I")
        picture = wide.point(lambda value: value / 257).convert("L")
        picture.info.pop("transparency", None)
        if isinstance(transparent, int):
            picture.putalpha(Image.fromarray(np.where(np.asarray(wide) == transparent, 0, 255).astype(np.uint8)))
    elif isinstance(transparent, tuple) and max(transparent) > 255:
        # A colour of 16 bits a channel: Pillow has kept the upper 8 of the picture's.
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def picture_of(sample: Sample) -> str:
    """The dataset's name for the sample's picture."""
    return str(sample.meta.get("picture", sample.id))


@runtime_checkable
class StoredPicture(Protocol):
    """A `Sample.load_image` that can also give the picture as it is stored, encoded."""

    where: str
    """Names the picture in messages."""

    def __call__(self) -> Image.Image: ...

    def read(self) -> bytes:
        """The encoded picture; raises what calling it raises."""

    def n_bytes(self) -> int | None:
        """About how many bytes `read` fetches; None where they come over a network."""


@dataclass(frozen=True)
class PictureFile:
    """The picture in a file."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def __call__(self) -> Image.Image:
        return load_picture(self.path)

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise _unreadable(self.where, error) from error

    def n_bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise _unreadable(self.where, error) from error


@dataclass(frozen=True)
class PictureBatch:
    """The pictures of a batch of samples; samples that share one share the object."""

    pictures: Pictures
    digests: tuple[str, ...]
    """Which picture each is: a digest of its encoded bytes, or of its pixels where it is drawn."""


def load_batch(batch: Sequence[Sample]) -> PictureBatch:
    """One picture per sample, each loaded once, whatever names its dataset has for it."""
    known: dict[Any, str] = {}
    pictures: dict[str, Image.Image] = {}
    for sample in batch:
        key = source_of(sample)
        if key in known:
            continue
        load = sample.load_image
        if isinstance(load, StoredPicture):
            data = load.read()
            known[key] = digest_of(data)
            if known[key] not in pictures:
                pictures[known[key]] = read_picture(data, load.where)
        else:
            picture = load()
            known[key] = digest_of(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
            pictures.setdefault(known[key], picture)
    digests = tuple(known[source_of(sample)] for sample in batch)
    return PictureBatch([pictures[digest] for digest in digests], digests)


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def source_of(sample: Sample) -> Any:
    """What samples share when they share a picture: its place, or the name of one that is drawn.

    Names alone are not enough: two folders may both be called `train` and have a picture `0.png`.
    """
    load = sample.load_image
    return load if isinstance(load, StoredPicture) else (sample.dataset, sample.split, picture_of(sample))


@dataclass(frozen=True)
class ViewBatches:
    """What the worker processes of a data loader compute: the views of batch number i, for a model and a geometry."""

    batches: Sequence[Sequence[Sample]]
    config: "LavidaConfig"
    geometry: "Geometry"

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PictureBatch | Exception:
        """An error is returned, not raised: the loader would put the worker's traceback before a user's one sentence.

        A bug keeps that traceback as a note.
        """
        from lavida_adapter.views import cut

        try:
            batch = load_batch(self.batches[number])
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            return error
        images = cast(dict[str, Image.Image], dict(zip(batch.digests, batch.pictures, strict=True)))
        views = {digest: cut(image, self.config, self.geometry) for digest, image in images.items()}
        return PictureBatch([views[digest] for digest in batch.digests], batch.digests)


def prefetch_pictures(
    batches: Sequence[Sequence[Sample]], config: "LavidaConfig", geometry: "Geometry", workers: int
) -> Iterator[PictureBatch | None]:
    """For each batch its pictures, made into views by `workers` processes; None without workers: load them yourself.

    Raises:
        UserError: `workers` is negative.
        Exception: whatever loading a picture raises.
    """
    if workers < 0:
        raise UserError(f"workers={workers}: give 0 or more")
    if not workers:
        yield from [None] * len(batches)
        return
    loader: DataLoader[Any] = DataLoader(
        ViewBatches(batches, config, geometry),  # type: ignore[arg-type]  # __len__ and __getitem__ are enough
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context="spawn",  # CUDA does not survive a fork
    )
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield cast(PictureBatch, found)


def _unchanged(views: object) -> object:
    return views
