"""The probe as files: pictures, rows, and a manifest that notices when either changes."""

import hashlib
import json
from pathlib import Path

from experiments.data.sample import Dataset
from experiments.study.files import write_atomic, write_json

METADATA = "metadata.jsonl"
MANIFEST = "manifest.json"
IMAGES = "images"


def write(data: Dataset, root: Path) -> Path:
    """Writes a split into a folder of its name; returns the folder.

    Raises:
        FileExistsError: there is one already.
    """
    folder = root / data.split
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it, or write to another folder")
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
    """What the manifest says of the rows and the pictures."""
    pictures = hashlib.sha256()
    for path in sorted((folder / IMAGES).glob("*.png")):
        pictures.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    rows = hashlib.sha256((folder / METADATA).read_bytes())
    return {"metadata": rows.hexdigest(), "pictures": pictures.hexdigest()}
