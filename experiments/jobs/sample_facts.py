"""What a job was asked: the facts of its samples as rows record them, and what has changed in the data since.

Answers belong to the samples that they were given to. A dataset whose labels were corrected, or one that has lost a
row, is other data under the same name.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from experiments.data.image_io import PictureFile, StoredPicture, digest_of, picture_of
from experiments.data.sample import Dataset, Listed, Sample, Traced
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
        "draft": sample.draft,
        "picture_bytes": load.n_bytes() if isinstance(load, PictureFile) else None,
    }


def content_of(dataset: Dataset) -> str | None:
    """Identifies the samples of a list by their facts: 16 hex digits. None for a dataset that draws each sample when
    it is asked for, because its options say all about it.
    """
    if not isinstance(dataset, Listed):
        return None
    digest = hashlib.sha256()
    for sample in (dataset[i] for i in range(len(dataset))):
        facts, load = facts_of(sample), sample.load_image
        if facts["picture_bytes"] is None and isinstance(load, StoredPicture):
            facts["picture_bytes"] = load.n_bytes()  # a cell's of a table: the table's size tells of other pictures
        digest.update(json.dumps(facts, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """What the record of a training says about a dataset beside its content; on the hub also the commit."""
    dropped = dict(dataset.dropped) if isinstance(dataset, Listed) else {}
    found = {"found": dict(dataset.provenance)} if isinstance(dataset, Traced) else {}
    return {"name": dataset.name, "split": dataset.split, "n": len(dataset), "dropped": dropped, **found}


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
    return compare_facts(rows, map(CurrentFacts(samples), samples))


def compare_facts(rows: Iterable[Mapping[str, Any]], facts: Iterable[Mapping[str, Any]]) -> list[Change]:
    """How the second ones differ from the first; what one of the two does not tell is not compared.

    Both are read side by side, and only those are held in memory that have no partner yet.
    """
    before: dict[str, Mapping[str, Any]] = {}
    now: dict[str, Mapping[str, Any]] = {}
    found = []
    for pair in zip_longest(rows, facts):
        for side, one in zip((before, now), pair, strict=True):
            if one is not None:
                side[one["id"]] = one
        for name in {one["id"]: None for one in pair if one is not None}:
            if name in before and name in now and (fields := differing(before.pop(name), now.pop(name))):
                found.append(Change(name, fields))
    return [*found, *(Change(name) for name in now), *(Change(name, gone=True) for name in before)]


def describe(found: Sequence[Change]) -> str:
    """The first changes in words, and how many there are."""
    shown = "; ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown}; {len(found)} samples in all"


def differing(row: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that are not what they were."""
    names = (
        _NAMES.get(key, key) for key, value in facts.items() if None not in (value, row.get(key)) and row[key] != value
    )
    return tuple(dict.fromkeys(names))


class CurrentFacts:
    """The facts of a sample as they are now; with the content of its picture, where all pictures are quick to read.

    Args:
        samples: all samples that will be asked for.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._quick = _are_quick(samples)
        self._digests: dict[StoredPicture, str] = {}

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """Raises UserError where the picture cannot be read."""
        picture = sample.load_image
        if not self._quick or not isinstance(picture, StoredPicture):
            return {**facts_of(sample)}
        if picture not in self._digests:
            self._digests[picture] = digest_of(picture.read())
        return {**facts_of(sample), "picture_digest": self._digests[picture]}


def _are_quick(samples: Iterable[Sample]) -> bool:
    """Whether the stored pictures of the samples are small in all."""
    seen: set[StoredPicture] = set()
    n_bytes = 0
    for sample in samples:
        picture = sample.load_image
        if not isinstance(picture, StoredPicture) or picture in seen:
            continue
        size = picture.n_bytes()
        if size is None or (n_bytes := n_bytes + size) > QUICK_BYTES:
            return False
        seen.add(picture)
    return True
