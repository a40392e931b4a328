"""The samples that the report shows: chosen once for a dataset, drawn while a job answers them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.data.sample import Box, Sample
from experiments.report.overlay import overlay
from experiments.study.files import read_json, write_atomic, write_json
from shirg import Selection

JPEG_QUALITY = 82
LONGEST = 448
ENLARGE = 2
"""How much a small picture is scaled up at most; the browser does the rest."""


@dataclass(frozen=True)
class Shot:
    """One sample as one job saw it."""

    record: dict[str, Any]
    picture: bytes
    overlay: bytes


def pick_shots(samples: Sequence[Sample], n: int) -> dict[str, int]:
    """Up to n sample ids and their numbers: kinds of question in turn, pictures not seen yet first.

    The choice depends on the dataset alone, so that the jobs of a study show the same samples.
    """
    kinds: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        key = (str(sample.meta.get("group", "")), str(sample.meta.get("density", "")), sample.subtask)
        kinds.setdefault(key, []).append(sample)
    chosen: list[str] = []
    seen: set[str] = set()
    while len(chosen) < min(n, len(samples)):
        for queue in kinds.values():
            fresh = next((s for s in queue if s.meta.get("picture", s.id) not in seen), queue[0] if queue else None)
            if fresh is not None and len(chosen) < n:
                queue.remove(fresh)
                seen.add(fresh.meta.get("picture", fresh.id))
                chosen.append(fresh.id)
    return {sample: number for number, sample in enumerate(chosen)}


def save_shot(
    folder: Path,
    number: int,
    image: Image.Image,
    selection: Selection,
    row: dict[str, Any],
    boxes: Sequence[Box],
    fine_area: float,
) -> None:
    """Writes NN.json, NN.jpg (the picture) and NN_kept.jpg (what was kept)."""
    longest = min(LONGEST, ENLARGE * max(image.size))
    used_T = selection.mask_BT[0]
    drawn = overlay(
        image,
        selection.box_BT4[0][used_T].float().cpu().tolist(),
        selection.source_BT[0][used_T].cpu().tolist(),
        fine_area=fine_area,
        targets=boxes,
        longest=longest,
    )
    plain = overlay(image, [(0, 0, 1, 1)], [0], targets=boxes, longest=longest)
    write_atomic(folder / f"{number:02d}_kept.jpg", _jpeg(drawn))
    write_atomic(folder / f"{number:02d}.jpg", _jpeg(plain))
    keys = (
        "id",
        "question",
        "answers",
        "prediction",
        "scores",
        "subtask",
        "group",
        "density",
        "n_visual",
        "sources",
        "recall",
    )
    write_json(folder / f"{number:02d}.json", {key: row[key] for key in keys})


def load_shots(folder: Path) -> list[Shot]:
    """What `save_shot` wrote, in order."""
    shots = []
    for path in sorted(folder.glob("*.json")):
        pictures = [path.with_suffix(".jpg"), path.with_name(f"{path.stem}_kept.jpg")]
        record = read_json(path)
        if record is not None and all(picture.exists() for picture in pictures):
            shots.append(Shot(record, *(picture.read_bytes() for picture in pictures)))
    return shots


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()
