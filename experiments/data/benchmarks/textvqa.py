"""TextVQA (Singh et al., 2019): questions about text in photographs, answered by ten people each."""

from collections.abc import Iterator
from pathlib import Path

from experiments.data.benchmarks.rows import (
    Item,
    Raw,
    answers_of,
    disk_rows,
    existing,
    id_of,
    question_of,
    read_json,
    rows_in,
)

VERSIONS = ("0.5.1", "0.5")


class Textvqa:
    """The pictures of train and val lie in one folder, those of test in another; test has no public answers."""

    columns = frozenset({"question_id", "question", "answers", "image_id"})

    def item(self, raw: Raw) -> Item:
        image = raw.fields.get("image_id")
        return Item(
            id=id_of(raw.fields, raw.where, "question_id", "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture=None if image is None else str(image),
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        path = existing([root / f"TextVQA_{v}_{split}.json" for v in VERSIONS], f"TextVQA's split {split!r}")
        folder = root / ("test_images" if split == "test" else "train_images")
        rows = rows_in(read_json(path), "data", path)
        return disk_rows(rows, path, lambda row, where: [folder / f"{id_of(row, where, 'image_id')}.jpg"])
