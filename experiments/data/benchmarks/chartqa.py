"""ChartQA (Masry et al., 2022): questions about charts, half of them written by people, half generated."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments.data.benchmarks.rows import (
    Item,
    Raw,
    answers_of,
    disk_rows,
    existing,
    first_value,
    question_of,
    read_json,
    rows_in,
)

KINDS = ("human", "augmented")


class Chartqa:
    """The hub's tables say who asked in a column, the official files in their names; there are no ids."""

    columns = frozenset({"type", "human_or_machine", "question", "query", "answer", "label", "imgname"})

    def item(self, raw: Raw) -> Item:
        return Item(
            id=raw.fields.get("id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers", "answer", "label"),
            picture=raw.fields.get("imgname"),
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
    """Who asked: "human" or "augmented"; "" in a folder that does not say."""
    machine = raw.fields.get("human_or_machine")
    given = KINDS[int(machine)] if machine is not None else str(raw.fields.get("type") or "")
    return next((kind for kind in KINDS if given.startswith(kind)), "")
