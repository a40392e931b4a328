"""DocVQA (Mathew et al., 2021) and InfographicVQA (2022): questions about pages and posters, in files of one form."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.data.benchmarks.rows import (
    Item,
    Raw,
    answers_of,
    disk_rows,
    existing,
    first_value,
    id_of,
    question_of,
    read_json,
    rows_in,
)


class Docvqa:
    """Task 1 of the Robust Reading Competition; the answers of its test split are not public."""

    columns = frozenset(
        {"questionId", "question_id", "question", "answers", "question_types"}
        | {"ucsf_document_id", "ucsf_document_page_no", "image_url"}
    )
    title = "DocVQA"
    files = ("{split}_v1.0_withQT.json", "{split}_v1.0.json")
    picture_column = "image"
    folders = ("{split}", "", "{split}/documents", "documents", "spdocvqa_images")
    """Where pictures may lie, under their whole name or its last part."""

    def item(self, raw: Raw) -> Item:
        page = [raw.fields.get(name) for name in ("ucsf_document_id", "ucsf_document_page_no")]
        return Item(
            id=id_of(raw.fields, raw.where, "questionId", "question_id", "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture="_".join(map(str, page)) if all(page) else raw.fields.get("image_url"),
            meta={"types": tuple(raw.fields.get("question_types") or ())},
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        names = [file.format(split=split) for file in self.files]
        homes = [home / name for home in (root / split, root) for name in names]
        path = existing(homes, f"{self.title}'s split {split!r}")
        folders = [root / folder.format(split=split) for folder in self.folders]

        def place(row: Mapping[str, Any], where: str) -> list[Path]:
            name = str(first_value(row, where, self.picture_column))
            return [folder / part for folder in folders for part in (name, Path(name).name)]

        return disk_rows(rows_in(read_json(path), "data", path), path, place)


class Infovqa(Docvqa):
    """Task 3 of the Robust Reading Competition."""

    title = "InfographicVQA"
    files = ("infographicsVQA_{split}_v1.0_withQT.json", "infographicsVQA_{split}_v1.0.json")
    picture_column = "image_local_name"
    folders = ("{split}", "", "infographicsvqa_images", "{split}/images", "images")
