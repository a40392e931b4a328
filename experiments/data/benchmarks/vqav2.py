"""VQAv2 (Goyal et al., 2017): questions about COCO photographs, answered by ten people each."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

COCO = {"train": "train2014", "val": "val2014"}
"""The splits whose answers are public, and what the official files call them."""


class Vqav2:
    """Questions and annotations are joined by question id."""

    columns = frozenset({"question_id", "question", "image_id", "answers", "multiple_choice_answer", "answer_type"})

    def item(self, raw: Raw) -> Item:
        image = raw.fields.get("image_id")
        return Item(
            id=id_of(raw.fields, raw.where, "question_id", "id"),
            question=question_of(raw),
            answers=answers_of(raw, "answers"),
            picture=None if image is None else str(image),
            target=str(raw.fields.get("multiple_choice_answer") or ""),
            subtask=str(raw.fields.get("answer_type") or ""),
        )

    def disk(self, root: Path, split: str) -> Iterator[Raw]:
        coco = COCO.get(split)
        if coco is None:
            raise ValueError(f"data.split={split} does not exist: VQAv2 has answers for {' and '.join(COCO)}")
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
