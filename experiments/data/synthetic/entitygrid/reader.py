"""Rows of the EntityGrid-style probe that somebody wrote to files or to a dataset repository."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experiments.data.benchmarks.rows import Item, Raw, answers_of, id_of, question_of, read_json
from experiments.data.folder import read_folder
from experiments.data.picture import load_picture
from experiments.data.synthetic.entitygrid.export import MANIFEST, METADATA, digests


class Entitygrid:
    """Rows as `python -m experiments.data.synthetic.entitygrid` writes them."""

    columns = frozenset({"id", "question", "answers", "subtask", "place", "entity", "boxes", "picture"})

    def item(self, raw: Raw) -> Item:
        boxes = raw.fields.get("boxes") or []
        if not all(len(box) == 4 for box in boxes):
            raise ValueError(f"{raw.where}: boxes must be lists of x0, y0, x1, y1, as fractions of the picture")
        return Item(
            id=id_of(raw.fields, raw.where, "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture=raw.fields.get("picture"),
            subtask=str(raw.fields.get("subtask") or ""),
            boxes=tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes),
            meta={name: str(raw.fields.get(name) or "") for name in ("place", "entity")},
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        folder = root / split
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"data.split={split} does not exist in {root}: write it with "
                f"`python -m experiments.data.synthetic.entitygrid {root} split={split}`"
            )
        manifest = read_json(folder / MANIFEST)
        if {key: manifest.get(key) for key in ("metadata", "pictures")} != digests(folder):
            raise ValueError(f"{folder} is not what its {MANIFEST} says: write it again, or use data.source=folder")
        for row in read_folder(folder, METADATA):
            yield Raw(
                fields=row.fields,
                where=f"{folder / METADATA}, {row.id}",
                picture=row.file_name,
                load_image=partial(load_picture, row.path),
            )
