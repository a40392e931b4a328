"""Samples as people look at them: the picture, what each system kept of it, and what it answered."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.report.shots import ExampleRecord, load_examples
from experiments.study.layout import labels
from experiments.study.rows import Row

SHOTS = "shots"
MAX_SHOTS = 8
MAX_PICTURES = 120
"""Pictures on a page: with many systems there are fewer samples, so that the page still opens at once."""
LONGEST_ANSWER = 40
RIGHT = 0.5
"""A score from here on counts as right where a sample is called right or wrong."""


@dataclass(frozen=True)
class SelectorView:
    """What one system kept and answered."""

    label: str
    image: str
    heat: str | None
    prediction: str
    score: float | None
    kept: str
    recall: float | None


@dataclass(frozen=True)
class ExampleCard:
    """One sample, as every system saw it."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    picture: str
    seen: tuple[SelectorView, ...]


def example_cards(study: Path, rows: Sequence[Row]) -> list[ExampleCard]:
    """The samples that most systems drew, in the order in which they were chosen."""
    seen: dict[str, list[tuple[str, ExampleRecord]]] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        for shot in load_examples(study / row["job"] / SHOTS):
            seen.setdefault(shot.record["id"], []).append((label, shot))
    most = max(1, min(MAX_SHOTS, MAX_PICTURES // (1 + len(rows))))
    common = sorted(seen, key=lambda sample: (-len(seen[sample]), list(seen).index(sample)))[:most]
    return [_example_card(seen[sample]) for sample in common]


def _example_card(views: Sequence[tuple[str, ExampleRecord]]) -> ExampleCard:
    first = views[0][1].record
    return ExampleCard(
        id=first["id"],
        question=first["question"],
        answers=tuple(first["answers"]),
        kind=" ".join(part for part in (first["group"], first["density"], first["subtask"]) if part),
        picture=inline_jpeg(views[0][1].picture),
        seen=tuple(
            SelectorView(
                label=label,
                image=inline_jpeg(shot.overlay),
                heat=None if shot.heat is None else inline_jpeg(shot.heat),
                prediction=printable(shot.record["prediction"]),
                score=next(iter(shot.record["scores"].values())),
                kept=f"{shot.record['n_visual']} tokens"
                + "".join(f", {count} {source}" for source, count in shot.record["sources"].items() if count),
                recall=shot.record["recall"],
            )
            for label, shot in views
        ),
    )


def printable(text: str, longest: int = LONGEST_ANSWER) -> str:
    """The text, not too long, with control characters spelt out, so that nothing a model says is invisible."""
    spelt = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return spelt if len(spelt) <= longest else spelt[:longest] + "..."


def inline_jpeg(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
