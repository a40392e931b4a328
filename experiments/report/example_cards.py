"""The examples of the page: samples with what each system kept of them and what it answered."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis.rows import Row, leading
from experiments.analysis.system_names import labels
from experiments.jobs.results import SHOTS
from experiments.viz.examples import ExampleRecord, load_examples, printable

MOST_CARDS = 8
MOST_PICTURES = 120
"""Pictures on a page: with many systems there are fewer examples, so that the page still opens at once."""
MANY_SYSTEMS = 50
"""From more systems on, the page has the examples of a few of them."""
FEW_SYSTEMS = 12
MOST_BYTES = 3 * 2**19
"""Of pictures as they are in the page of many systems; one example is always there."""


@dataclass(frozen=True)
class SelectorView:
    """What one system kept of an example, and what it answered."""

    label: str
    image: str
    heat: str | None
    prediction: str
    score: float | None
    kept: str
    recall: float | None


@dataclass(frozen=True)
class ExampleCard:
    """One sample with the views of all systems; pictures are data URLs."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    picture: str
    views: tuple[SelectorView, ...]

    @property
    def n_bytes(self) -> int:
        return len(self.picture) + sum(len(view.image) + len(view.heat or "") for view in self.views)


def example_cards(study: Path, rows: Sequence[Row]) -> list[ExampleCard]:
    """The samples that most systems drew, in the order in which they were chosen."""
    many = len(rows) > MANY_SYSTEMS
    shown = leading([row for row in rows if row["status"] == "ok"], FEW_SYSTEMS) if many else rows
    names = dict(zip((row["job"] for row in rows), labels(rows), strict=True))
    found: dict[str, list[tuple[str, ExampleRecord]]] = {}
    for row in shown:
        for example in load_examples(study / row["job"] / SHOTS):
            found.setdefault(example.record["id"], []).append((names[row["job"]], example))
    most = max(1, min(MOST_CARDS, MOST_PICTURES // (1 + len(shown))))
    common = sorted(found, key=lambda sample: (-len(found[sample]), list(found).index(sample)))[:most]
    cards = [_example_card(found[sample]) for sample in common]
    if many:
        while len(cards) > 1 and sum(card.n_bytes for card in cards) > MOST_BYTES:
            cards.pop()
    return cards


def _example_card(examples: Sequence[tuple[str, ExampleRecord]]) -> ExampleCard:
    first = examples[0][1].record
    return ExampleCard(
        id=first["id"],
        question=first["question"],
        answers=tuple(first["answers"]),
        kind=kind_of(first["group"], first["density"], first["subtask"]),
        picture=inline_jpeg(examples[0][1].picture),
        views=tuple(
            SelectorView(
                label=label,
                image=inline_jpeg(example.overlay),
                heat=None if example.heat is None else inline_jpeg(example.heat),
                prediction=printable(example.record["prediction"]),
                score=next(iter(example.record["scores"].values())),
                kept=f"{example.record['n_visual']} tokens"
                + "".join(f", {count} {source}" for source, count in example.record["sources"].items() if count),
                recall=example.record["recall"],
            )
            for label, example in examples
        ),
    )


def kind_of(group: str, density: str, subtask: str) -> str:
    """The kind of a question in words."""
    return " ".join(filter(None, (group, density, subtask)))


def inline_jpeg(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
