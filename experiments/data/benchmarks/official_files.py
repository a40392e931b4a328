"""One reader for each benchmark: its official files on disk, and the meaning of its columns in any source.

A source gives raw rows (`Raw`); a reader turns each into an `Item`, a row in this project's terms.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from experiments.data.image_io import PictureFile
from experiments.data.sample import Box, check_texts
from lavida_adapter.checkpoint_files import parse_json
from shirg import MissingFileError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A row as its source has it; the picture is not opened yet."""

    fields: Mapping[str, Any]
    where: str
    """Names the row in messages."""
    picture: str
    """The source's name for the picture."""
    load_image: Callable[[], Image.Image]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row in this project's terms; see `experiments.data.sample.Sample`."""

    question: str
    answers: tuple[str, ...]
    """Empty where the split has none."""
    id: str | None = None
    """None: numbered within the split and the subtask."""
    picture: str | None = None
    """None: the source's name for it."""
    target: str = ""
    subtask: str = ""
    boxes: tuple[Box, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """The file layout and the columns of one benchmark."""

    columns: frozenset[str]
    """Columns of the hub's tables that it reads, besides "image"; none of them is large."""

    def item(self, raw: Raw) -> Item:
        """A row of the hub, of the official files, or of a folder whose lines use the same names."""
        ...

    def disk(self, root: Path, split: str) -> Iterable[Raw]:
        """The rows of a split in the official layout.

        Raises:
            MissingFileError: a file of the split is missing.
        """
        ...


def first_value(fields: Mapping[str, Any], where: str, *names: str) -> Any:
    """The value of the first of these columns that the row has."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise UserError(f"{where}: has no {' or '.join(names)}; it has {', '.join(fields)}")


def question_of(raw: Raw) -> str:
    question = first_value(raw.fields, raw.where, "question", "query")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{raw.where}: the question is {question!r:.80}; it must be a text that is not empty")
    check_texts([question], raw.where)
    return question


def answers_of(raw: Raw, *names: str) -> tuple[str, ...]:
    """Answers in their order: one text, a list of texts, or a list of objects with "answer"; () where all are blank."""
    value: Any = next((raw.fields[name] for name in names if raw.fields.get(name) is not None), ())
    answers = value if isinstance(value, list | tuple) else [value]
    named = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    texts = [text for text in named if isinstance(text, str)]
    if len(texts) < len(named):
        raise UserError(f"{raw.where}: the answers are {value!r:.80}; they must be texts")
    check_texts(texts, raw.where)
    return tuple(texts) if any(text.strip() for text in texts) else ()


def id_of(fields: Mapping[str, Any], where: str, *names: str) -> str:
    """The official id, a number or a text."""
    value = first_value(fields, where, *names)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise UserError(f"{where}: {names[0]} is {value!r:.80}; it must be a whole number or a text")
    return str(value)


def text_of(raw: Raw, name: str) -> str:
    """A column that may be missing: its text or number as a text, "" for none."""
    value = raw.fields.get(name)
    if not isinstance(value, str | int | None):
        raise UserError(f"{raw.where}: {name} is {value!r:.80}; it must be a text")
    return "" if value is None else str(value)


def read_json(path: Path) -> Any:
    """The content of a file of the official layout; UserError if it is broken."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error


def rows_in(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """The list of objects that an official file is, or has under a key."""
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no list of questions under {key!r}; is it the official file?")
    return rows


def existing(candidates: Iterable[Path], what: str) -> Path:
    """The first of these files that exists."""
    tried = list(candidates)
    for path in tried:
        if os.path.isfile(path):
            return path
    raise MissingFileError(f"{what} is missing: looked for {', '.join(str(path)[:200] for path in tried)}")


def disk_rows(
    rows: Iterable[Mapping[str, Any]], path: Path, place: Callable[[Mapping[str, Any], str], Iterable[Path]]
) -> Iterator[Raw]:
    """The rows of an official file with their pictures; `place` gives the paths where a row's picture may be."""
    for number, row in enumerate(rows):
        where = f"{path}, entry {number}"
        picture = existing(place(row, where), f"{where}: its picture")
        yield Raw(fields=row, where=where, picture=picture.name, load_image=PictureFile(picture))


KINDS = ("human", "augmented")


class Chartqa:
    """Who asked is a column of the hub's tables and part of the official files' names; there are no ids."""

    columns = frozenset({"type", "human_or_machine", "question", "query", "answer", "label", "imgname"})

    def item(self, raw: Raw) -> Item:
        return Item(
            id=text_of(raw, "id") or None,
            question=question_of(raw),
            answers=answers_of(raw, "answers", "answer", "label"),
            picture=text_of(raw, "imgname") or None,
            subtask=_kind(raw),
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        for kind in KINDS:
            files = [home / split / f"{split}_{kind}.json" for home in (root, root / "ChartQA Dataset")]
            path = existing(files, f"ChartQA's split {split!r}")
            rows = ({**row, "type": kind} for row in rows_in(read_json(path), "data", path))
            yield from disk_rows(rows, path, partial(_picture, path.parent / "png"))


def _picture(folder: Path, row: Mapping[str, Any], where: str) -> list[Path]:
    return [folder / str(first_value(row, where, "imgname"))]


def _kind(raw: Raw) -> str:
    """Who asked: "human" or "augmented"; "" in a folder without that column."""
    machine = raw.fields.get("human_or_machine")
    if machine is not None and machine not in (0, 1):
        raise UserError(f"{raw.where}: human_or_machine is {machine!r:.80}; it must be 0 (human) or 1 (augmented)")
    given = text_of(raw, "type") if machine is None else KINDS[int(machine)]
    return next((kind for kind in KINDS if given.startswith(kind)), "")


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
    """Folders that may hold the pictures, under their whole name or its last part."""

    def item(self, raw: Raw) -> Item:
        page = [text_of(raw, name) for name in ("ucsf_document_id", "ucsf_document_page_no")]
        types = raw.fields.get("question_types") or ()
        if not isinstance(types, list | tuple) or not all(isinstance(kind, str) for kind in types):
            raise UserError(f"{raw.where}: question_types is {types!r:.80}; it must be a list of texts")
        return Item(
            id=id_of(raw.fields, raw.where, "questionId", "question_id", "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture="_".join(page) if all(page) else text_of(raw, "image_url") or None,
            meta={"types": tuple(types)},
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


VERSIONS = ("0.5.1", "0.5")


class Textvqa:
    """Train and val share a folder of pictures, test has another; the answers of test are not public."""

    columns = frozenset({"question_id", "question", "answers", "image_id"})

    def item(self, raw: Raw) -> Item:
        return Item(
            id=id_of(raw.fields, raw.where, "question_id", "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture=text_of(raw, "image_id") or None,
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        path = existing([root / f"TextVQA_{v}_{split}.json" for v in VERSIONS], f"TextVQA's split {split!r}")
        folder = root / ("test_images" if split == "test" else "train_images")
        rows = rows_in(read_json(path), "data", path)
        return disk_rows(rows, path, lambda row, where: [folder / f"{id_of(row, where, 'image_id')}.jpg"])


COCO = {"train": "train2014", "val": "val2014"}
"""The splits whose answers are public, and what the official files call them."""


class Vqav2:
    """Questions and annotations are joined by question id."""

    columns = frozenset({"question_id", "question", "image_id", "answers", "multiple_choice_answer", "answer_type"})

    def item(self, raw: Raw) -> Item:
        return Item(
            id=id_of(raw.fields, raw.where, "question_id", "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture=text_of(raw, "image_id") or None,
            target=text_of(raw, "multiple_choice_answer"),
            subtask=text_of(raw, "answer_type"),
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        coco = COCO.get(split)
        if coco is None:
            raise UserError(f"data.split={split} does not exist: VQAv2 has answers for {' and '.join(COCO)}")
        homes = (root, root / "annotations", root / "questions")
        asked = existing([h / f"v2_OpenEnded_mscoco_{coco}_questions.json" for h in homes], f"VQAv2's split {split!r}")
        answered = existing([h / f"v2_mscoco_{coco}_annotations.json" for h in homes], f"VQAv2's answers for {split!r}")
        answers = {row.get("question_id"): row for row in rows_in(read_json(answered), "annotations", answered)}
        questions = rows_in(read_json(asked), "questions", asked)
        rows = ({**answers.get(question.get("question_id"), {}), **question} for question in questions)

        def place(row: Mapping[str, Any], where: str) -> list[Path]:
            name = f"COCO_{coco}_{id_of(row, where, 'image_id'):0>12}.jpg"
            return [home / coco / name for home in (root, root / "images")]

        return disk_rows(rows, asked, place)
