"""`data=folder`: your own pictures, with one question a row of a metadata file."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.data.image_io import PictureFile
from experiments.data.metadata_files import DEFAULT, NEEDED, find_metadata, read_metadata
from experiments.data.sample import Sample, check_texts, draw_ids
from shirg import MissingFileError, UserError


@dataclass(frozen=True)
class FolderRow:
    """One row of the metadata file, checked."""

    id: str
    file_name: str
    path: Path
    question: str
    answers: tuple[str, ...]
    draft: str
    """A text with gaps; "" where the line has none."""
    fields: dict[str, Any]
    """Everything in the row."""


class Folder:
    """A folder of pictures and a metadata file: JSON lines, CSV or Parquet (`experiments.data.metadata_files`).

    A row has "file_name" (inside the folder), "question", "answers" (a text or a list of texts; "answer" works too)
    and optionally "question_id" or "id", and "draft" (or "drafts"), a text with gaps to fill; other keys are ignored.
    All rows are checked when the dataset is built; pictures are decoded when they are needed.

    Args:
        root: the folder.
        metadata: name of the metadata file in it; the default also finds metadata.csv and metadata.parquet.
        limit: use this many rows, drawn with `seed`; a smaller limit draws a part of a larger one's rows.
        seed: for `limit`.
        suffix: put after each question in the prompt.
        draft: a text with gaps that the model fills, for each line without a "draft" of its own; null for free answers.
        answer_rule: which part of the generated text is the answer: "whole", "final" or "gaps".
        max_new_tokens: longest answer in tokens.
        metrics: names of `experiments.metrics`; the first is the headline.
        name: what the dataset is called in tables; the folder's name by default.

    Raises:
        MissingFileError: the folder, its metadata or a picture is not there.
        UserError: a line is unusable; the message names it.
    """

    split = "all"
    questions_per_picture = 1

    def __init__(
        self,
        *,
        root: str | Path,
        metadata: str = DEFAULT,
        limit: int | None = None,
        seed: int = 0,
        suffix: str = "",
        draft: str | None = None,
        answer_rule: str = "whole",
        max_new_tokens: int = 16,
        metrics: Sequence[str] = ("exact_match", "relaxed_accuracy", "anls"),
        name: str | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"data.limit={limit} must be a positive number of rows, or null for all")
        folder = Path(root)
        if not os.path.isdir(folder):
            raise MissingFileError(f"data folder {folder!s:.200} does not exist: set data.root to DIR, with {metadata}")
        self.name = name or folder.resolve().name
        self.metric_names = tuple(metrics)
        self.max_new_tokens = max_new_tokens
        self.answer_rule = answer_rule
        self._suffix, self._draft = suffix, draft or ""
        self._rows = _subset(read_folder(folder, metadata), limit, seed)
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._rows[index])

    def keep(self, fits: Callable[[Sample], bool], reason: str) -> None:
        rows = [row for row in self._rows if fits(self._sample(row))]
        if lost := len(self._rows) - len(rows):
            self.dropped[reason] += lost
        self._rows = rows

    def _sample(self, row: FolderRow) -> Sample:
        return Sample(
            id=row.id,
            dataset=self.name,
            split=self.split,
            load_image=PictureFile(row.path),
            size=None,
            question=row.question,
            prompt=row.question + self._suffix,
            answers=row.answers,
            draft=row.draft or self._draft,
            meta={"picture": row.file_name},
        )


def read_folder(folder: Path, metadata: str = DEFAULT) -> list[FolderRow]:
    """Every row of the metadata file, checked; raises what `Folder` raises."""
    rows: list[FolderRow] = []
    first_of_id: dict[str, str] = {}
    seen_of_file: Counter[str] = Counter()
    for where, fields in read_metadata(folder, metadata):
        file_name = _text(fields, "file_name", where)
        row = FolderRow(
            id=_given_id(fields, where) or f"{file_name}#{seen_of_file[file_name]}",
            file_name=file_name,
            path=_picture_path(folder, file_name, where),
            question=_text(fields, "question", where),
            answers=_answers(fields, where),
            draft=_draft(fields, where),
            fields=fields,
        )
        if row.id in first_of_id:
            raise UserError(f"{where}: id {row.id!r} is also on {first_of_id[row.id]}; ids must be unique")
        first_of_id[row.id] = where.rpartition(", ")[2]
        seen_of_file[file_name] += 1
        rows.append(row)
    if not rows:
        raise UserError(f"{find_metadata(folder, metadata)} is empty: write rows with {NEEDED}")
    return rows


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: needs a non-empty text {key!r}")
    check_texts((value,), where)
    return value


def _answers(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    value = fields.get("answers", fields.get("answer"))
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UserError(f"{where}: needs 'answers', a text or a list of texts (numbers in quotes), none of them empty")
    check_texts(answers, where)
    return tuple(answers)


def _draft(fields: dict[str, Any], where: str) -> str:
    value = fields.get("draft", fields.get("drafts"))
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: 'draft' must be a non-empty text with gaps, such as 'A photo of [GAP].'")
    check_texts((value,), where)
    return value


def _given_id(fields: dict[str, Any], where: str) -> str | None:
    value = fields.get("question_id", fields.get("id"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise UserError(f"{where}: the id must be a text or a whole number, not {value!r}")
    return str(value)


def _picture_path(folder: Path, file_name: str, where: str) -> Path:
    """The picture's path, after making sure that it is a file inside the folder."""
    relative = Path(file_name)
    try:
        inside = not relative.is_absolute() and ".." not in relative.parts
        inside = inside and (folder / relative).resolve().is_relative_to(folder.resolve())
        size = (folder / relative).stat().st_size if inside and (folder / relative).is_file() else None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name the file system cannot hold
        raise UserError(f"{where}: picture {file_name!r} cannot be looked up ({error})") from error
    if not inside:
        raise UserError(f"{where}: picture {file_name!r} is outside the data folder; move it into {folder}")
    if size is None:
        raise MissingFileError(f"{where}: picture {file_name!r} does not exist in {folder}; add it or remove the row")
    if size == 0:
        raise UserError(f"{where}: picture {folder / relative} is an empty file; replace it or remove the row")
    return folder / relative


def _subset(rows: list[FolderRow], limit: int | None, seed: int) -> list[FolderRow]:
    """`limit` rows drawn with the seed, in file order."""
    chosen = draw_ids([row.id for row in rows], limit, seed)
    return [row for row in rows if row.id in chosen]
