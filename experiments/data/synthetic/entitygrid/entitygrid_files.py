"""EntityGrid-style questions as files: pictures, rows, and a manifest with their digests."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.atomic_files import write_atomic, write_json
from experiments.data.benchmarks.official_files import Item, Raw, answers_of, id_of, question_of, read_json
from experiments.data.folder import read_folder
from experiments.data.image_io import PictureFile
from experiments.data.sample import Dataset
from shirg import MissingFileError, UserError

METADATA = "metadata.jsonl"
MANIFEST = "manifest.json"
IMAGES = "images"


def write(data: Dataset, root: Path) -> Path:
    """Writes a split into a folder of its name; returns the folder.

    Raises:
        UserError: the folder exists already.
    """
    folder = root / data.split
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or write to another folder")
    (folder / IMAGES).mkdir(parents=True)
    written: dict[str, str] = {}
    lines = []
    for sample in (data[i] for i in range(len(data))):
        picture = str(sample.meta["picture"])
        if picture not in written:
            written[picture] = f"{IMAGES}/{len(written):05d}.png"
            sample.load_image().save(folder / written[picture])
        row = {
            "file_name": written[picture],
            "id": sample.id,
            "question": sample.question,
            "answers": list(sample.answers),
            "subtask": sample.subtask,
            "place": sample.meta["place"],
            "entity": sample.meta["entity"],
            "boxes": sample.boxes,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(folder / METADATA, "".join(lines))
    write_json(folder / MANIFEST, {"version": 1, "questions": len(lines), **digests(folder)})
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Digests of the rows and of the pictures, as the manifest stores them."""
    pictures = hashlib.sha256()
    for path in sorted((folder / IMAGES).glob("*.png")):
        pictures.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    rows = hashlib.sha256((folder / METADATA).read_bytes())
    return {"metadata": rows.hexdigest(), "pictures": pictures.hexdigest()}


class Entitygrid:
    """Rows as `python -m experiments.data.synthetic.entitygrid` writes them."""

    columns = frozenset({"id", "question", "answers", "subtask", "place", "entity", "boxes", "picture"})

    def item(self, raw: Raw) -> Item:
        boxes = raw.fields.get("boxes") or []
        if not all(len(box) == 4 for box in boxes):
            raise UserError(f"{raw.where}: boxes must be lists of x0, y0, x1, y1, as fractions of the picture")
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
        if not os.path.isfile(folder / MANIFEST):
            raise MissingFileError(
                f"data.split={split} does not exist in {root}: write it with "
                f"`python -m experiments.data.synthetic.entitygrid {root} split={split}`"
            )
        manifest = read_json(folder / MANIFEST)
        if {key: manifest.get(key) for key in ("metadata", "pictures")} != digests(folder):
            raise UserError(f"{folder} is not what its {MANIFEST} says: write it again, or use data.source=folder")
        for row in read_folder(folder, METADATA):
            yield Raw(
                fields=row.fields,
                where=f"{folder / METADATA}, {row.id}",
                picture=row.file_name,
                load_image=PictureFile(row.path),
            )
