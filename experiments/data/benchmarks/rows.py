"""What sources and readers hand each other: a raw row of a source, and the same row in this project's terms."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from experiments.data.picture import load_picture
from experiments.data.sample import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A row as its source has it; the picture is not opened yet."""

    fields: Mapping[str, Any]
    where: str
    """Names the row in messages."""
    picture: str
    """Names the picture, as far as the source knows."""
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
    """None: what the source calls it."""
    target: str = ""
    subtask: str = ""
    boxes: tuple[Box, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """What is special about one benchmark."""

    columns: frozenset[str]
    """Columns of the hub's tables that it can use, besides "image"; none of them is large."""

    def item(self, raw: Raw) -> Item:
        """A row of the hub, of the official files, or of a folder whose lines use the same names."""
        ...

    def disk(self, root: Path, split: str) -> Iterable[Raw]:
        """The rows of a split in the official layout; FileNotFoundError where it is not there."""
        ...


def first_value(fields: Mapping[str, Any], where: str, *names: str) -> Any:
    """The value of the first of these columns that the row has."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise ValueError(f"{where}: has no {' or '.join(names)}; it has {', '.join(fields)}")


def question_of(raw: Raw) -> str:
    question = first_value(raw.fields, raw.where, "question", "query")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{raw.where}: the question is {question!r}; it must be a text that is not empty")
    return question


def answers_of(raw: Raw, *names: str) -> tuple[str, ...]:
    """Answers in their order: one text, a list of texts, or a list of objects with "answer"; () where all are blank."""
    value: Any = next((raw.fields[name] for name in names if raw.fields.get(name) is not None), ())
    answers = value if isinstance(value, list | tuple) else [value]
    named = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    texts = [text for text in named if isinstance(text, str)]
    if len(texts) < len(named):
        raise ValueError(f"{raw.where}: the answers are {value!r}; they must be texts")
    return tuple(texts) if any(text.strip() for text in texts) else ()


def id_of(fields: Mapping[str, Any], where: str, *names: str) -> str:
    """The official id, a number or a text."""
    value = first_value(fields, where, *names)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise ValueError(f"{where}: {names[0]} is {value!r}; it must be a whole number or a text")
    return str(value)


def read_json(path: Path) -> Any:
    """A file of the official layout; a sentence where it is broken."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error


def rows_in(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """The list of objects that an official file is, or has under a key."""
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no list of questions under {key!r}; is it the official file?")
    return rows


def existing(candidates: Iterable[Path], what: str) -> Path:
    """The first of these files that is there."""
    tried = list(candidates)
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{what} is missing: looked for {', '.join(map(str, tried))}")


def disk_rows(
    rows: Iterable[Mapping[str, Any]], path: Path, place: Callable[[Mapping[str, Any], str], Iterable[Path]]
) -> Iterator[Raw]:
    """The rows of an official file with their pictures; `place` says where one may lie."""
    for number, row in enumerate(rows):
        where = f"{path}, entry {number}"
        picture = existing(place(row, where), f"{where}: its picture")
        yield Raw(fields=row, where=where, picture=picture.name, load_image=partial(load_picture, picture))
