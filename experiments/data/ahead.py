"""The pictures of an evaluation's batches: loaded where they are answered, or cut into views ahead of time by workers.

Decoding a page and resizing it takes a core longer than a GPU takes to look at it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from torch.utils.data import DataLoader

from experiments.data.sample import Sample

if TYPE_CHECKING:
    from lavida_adapter import LavidaConfig
    from lavida_adapter.views import Views
    from shirg import Geometry

Pictures = Sequence["Image.Image | Views"]
"""One for each sample; samples that share a picture share the object, and the tower runs once for it."""


def picture_of(sample: Sample) -> str:
    """The name of the sample's picture; samples that share it are one cluster."""
    return str(sample.meta.get("picture", sample.id))


def load_pictures(batch: Sequence[Sample]) -> list[Image.Image]:
    """One picture per sample, each loaded once."""
    pictures: dict[str, Image.Image] = {}
    for sample in batch:
        if picture_of(sample) not in pictures:
            pictures[picture_of(sample)] = sample.load_image()
    return [pictures[picture_of(sample)] for sample in batch]


@dataclass(frozen=True)
class CutBatches:
    """Batches as a data loader's workers see them: by number, cut for a model and a geometry."""

    batches: Sequence[Sequence[Sample]]
    config: "LavidaConfig"
    geometry: "Geometry"

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> "list[Views] | Exception":
        """What goes wrong is given back: a loader would wrap its one sentence into a worker's traceback."""
        from lavida_adapter.geometries import cut

        try:
            images = load_pictures(self.batches[number])
        except Exception as error:
            return error
        views = {id(image): cut(image, self.config, self.geometry) for image in images}
        return [views[id(image)] for image in images]


def read_ahead(
    batches: Sequence[Sequence[Sample]], config: "LavidaConfig", geometry: "Geometry", workers: int
) -> Iterator[Pictures | None]:
    """For each batch its pictures, cut by so many processes; None without workers: load them yourself.

    Raises:
        ValueError: for a negative number, and whatever loading a picture raises.
    """
    if workers < 0:
        raise ValueError(f"workers={workers}: give 0 or more")
    if not workers:
        yield from [None] * len(batches)
        return
    loader: DataLoader[Any] = DataLoader(
        CutBatches(batches, config, geometry),  # type: ignore[arg-type]  # a map by number is all that it needs
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="spawn",  # CUDA does not survive a fork
    )
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield cast(Pictures, found)


def _as_it_is(views: object) -> object:
    return views
