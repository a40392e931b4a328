"""What a job was asked: the facts of its samples as rows record them, and what has changed in the data since.

Answers belong to the samples that they were given to. A dataset whose labels were corrected, or one that has lost a
row, is other data under the same name.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.data.image_io import PictureFile, StoredPicture, digest_of, picture_of
from experiments.data.sample import Dataset, Listed, Sample
from experiments.jobs.sample_rows import SampleFacts

QUICK_BYTES = 2**28
"""Pictures that together are no larger are compared by content, larger sets by the sizes of their files."""
_NAMES = {"picture_digest": "picture", "picture_bytes": "picture"}
_SHOWN = 3


def facts_of(sample: Sample) -> SampleFacts:
    """What a row says about its sample, all but the picture's content.

    Raises:
        UserError: the picture's file is not there any more.
    """
    load = sample.load_image
    return {
        "id": sample.id,
        "picture": picture_of(sample),
        "question": sample.question,
        "prompt": sample.prompt,
        "answers": list(sample.answers),
        "target": sample.target,
        "subtask": sample.subtask,
        "group": str(sample.meta.get("group", "")),
        "density": str(sample.meta.get("density", "")),
        "place": str(sample.meta.get("place", "")),
        "entity": str(sample.meta.get("entity", "")),
        "boxes": [list(box) for box in sample.boxes],
        "history": list(sample.history),
        "picture_bytes": load.n_bytes() if isinstance(load, PictureFile) else None,
    }


def content_of(dataset: Dataset) -> str | None:
    """Identifies the samples of a dataset of files by their facts: 16 hex digits. None for one whose samples are drawn,
    because its options say all about it.
    """
    if not isinstance(dataset, Listed):
        return None
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        digest.update(json.dumps(facts_of(dataset[i]), ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """A sample that is not what it was, and which fields differ; no fields for one that is new or gone."""

    id: str
    fields: tuple[str, ...] = ()
    gone: bool = False

    def __str__(self) -> str:
        if self.fields:
            return f"{self.id} has another {' and '.join(self.fields)}"
        return f"{self.id} is {'gone' if self.gone else 'new'}"


def changes(rows: Iterable[Mapping[str, Any]], samples: Sequence[Sample]) -> list[Change]:
    """How samples differ from those that were answered, in the order of the data; what no row tells is not compared.

    Raises:
        UserError: a picture cannot be read.
    """
    contents = _contents(samples)
    return compare_facts(rows, ({**facts_of(s), "picture_digest": contents.get(s.id)} for s in samples))


def compare_facts(rows: Iterable[Mapping[str, Any]], facts: Iterable[Mapping[str, Any]]) -> list[Change]:
    """How the second ones differ from the first; what one of the two does not tell is not compared."""
    before = {row["id"]: row for row in rows}
    found = []
    for now in facts:
        row = before.pop(now["id"], None)
        if row is None:
            found.append(Change(now["id"]))
        elif differing := _differing(row, now):
            found.append(Change(now["id"], differing))
    return [*found, *(Change(name, gone=True) for name in before)]


def describe(found: Sequence[Change]) -> str:
    """The first changes in words, and how many there are."""
    shown = "; ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown}; {len(found)} samples in all"


def _differing(row: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    names = (
        _NAMES.get(key, key) for key, value in facts.items() if None not in (value, row.get(key)) and row[key] != value
    )
    return tuple(dict.fromkeys(names))


def _contents(samples: Sequence[Sample]) -> dict[str, str]:
    """The digest of each sample's picture by id, where the files are quick to read."""
    stored = {sample.id: sample.load_image for sample in samples if isinstance(sample.load_image, StoredPicture)}
    sizes = {picture: picture.n_bytes() for picture in dict.fromkeys(stored.values())}
    known = [size for size in sizes.values() if size is not None]
    if len(known) < len(sizes) or sum(known) > QUICK_BYTES:
        return {}
    digests = {picture: digest_of(picture.read()) for picture in sizes}
    return {name: digests[picture] for name, picture in stored.items()}
