"""Examples: the samples that the report shows, chosen once for a dataset, drawn while a job answers them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.atomic_files import encode_json, read_json, write_atomic
from experiments.data.image_io import picture_of
from experiments.data.sample import Box, Sample
from experiments.errors import ConfigError, leave_out
from experiments.token_stats import TokenGeometry
from experiments.viz.kept_tokens import heat_map, kept_map, overlay
from shirg import Selection

JPEG_QUALITY = 82
LONGEST = 448
ENLARGE = 2
"""The largest factor by which a small picture is scaled up; the browser does the rest."""
LONGEST_TEXT = 40
_STORED = tuple("id question answers prediction scores subtask group density n_visual sources recall".split())
"""Fields of a `SampleRow` that an example stores."""


@dataclass(frozen=True)
class ExampleRecord:
    """One example of one job, with its pictures as JPEG files."""

    number: int
    record: dict[str, Any]
    picture: bytes
    overlay: bytes
    heat: bytes | None
    """The scores that tokens were ranked by; None for a selector without any."""


def pick_examples(samples: Sequence[Sample], n: int) -> dict[str, int]:
    """Up to n sample ids and their numbers: kinds of question in turn, pictures not seen yet first.

    The choice depends on the dataset alone, so that the jobs of a study show the same samples.
    """
    kinds: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    pictures: dict[tuple[str, ...], set[str]] = {}
    for sample in samples if n else ():
        key = (str(sample.meta.get("group", "")), str(sample.meta.get("density", "")), sample.subtask)
        queue, known = kinds.setdefault(key, []), pictures.setdefault(key, set())
        picture = picture_of(sample)
        # Of a kind no more than n are chosen: its first ones, or the first ones about its first n pictures.
        if len(queue) < n or (len(known) < n and picture not in known):
            queue.append((sample.id, picture))
            known.add(picture)
    chosen: list[str] = []
    seen: set[str] = set()
    while len(chosen) < min(n, len(samples)):
        for queue in kinds.values():
            fresh = next((pair for pair in queue if pair[1] not in seen), queue[0] if queue else None)
            if fresh is not None and len(chosen) < n:
                queue.remove(fresh)
                seen.add(fresh[1])
                chosen.append(fresh[0])
    return {sample: number for number, sample in enumerate(chosen)}


def save_example(
    folder: Path,
    number: int,
    image: Image.Image,
    selection: Selection,
    row: Mapping[str, Any],
    boxes: Sequence[Box],
    geometry: TokenGeometry,
) -> None:
    """Writes NN.json, NN.jpg (the picture), NN_kept.jpg (kept tokens) and, for a selector that ranks, NN_heat.jpg.

    No result depends on them: a job does not wait for the disk.
    """
    longest = min(LONGEST, ENLARGE * max(image.size))
    plain = overlay(image, [(0, 0, 1, 1)], [0], targets=boxes, longest=longest)
    heat = None if selection.scores_BN is None else heat_map(image, selection.scores_BN[0], geometry, longest=longest)
    drawn = {"_kept": kept_map(image, selection, geometry, boxes, longest), "_heat": heat, "": plain}
    for part, drawing in drawn.items():
        if drawing is not None:
            write_atomic(folder / f"{number:02d}{part}.jpg", _jpeg(drawing), durable=False)
    record = encode_json({key: row[key] for key in _STORED})
    write_atomic(folder / f"{number:02d}.json", record, durable=False)


def load_examples(folder: Path) -> list[ExampleRecord]:
    """What `save_example` wrote, in order; what is damaged is left out, with a word."""
    examples = []
    for path in sorted(folder.glob("*.json")):
        try:
            examples.append(_load_example(path))
        except (ValueError, OSError) as error:
            leave_out(path, error)
    return examples


def _load_example(path: Path) -> ExampleRecord:
    if not path.stem.isdecimal():
        raise ConfigError("is no example: their names are numbers")
    record = None if path.is_symlink() else read_json(path)
    if record is None or not set(_STORED) <= record.keys():
        raise ConfigError("is not the record of an example")
    plain, kept, heat = (path.with_name(f"{path.stem}{part}.jpg") for part in ("", "_kept", "_heat"))
    drawn = _jpeg_of(heat) if heat.exists() else None
    return ExampleRecord(int(path.stem), record, _jpeg_of(plain), _jpeg_of(kept), drawn)


def _jpeg_of(path: Path) -> bytes:
    """The file; a link could lead to any file of this machine, which the page would then hold."""
    data = b"" if path.is_symlink() else path.read_bytes()
    if not data.startswith(b"\xff\xd8"):
        raise ConfigError(f"{path.name} is no JPEG file")
    return data


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, shortened, with control characters as escapes, so that everything in an answer is visible."""
    escaped = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return escaped if len(escaped) <= longest else escaped[:longest] + "..."


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()
