"""What the slides say about a study: which rows stand for what, and sentences with their figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.report.cards import RIGHT, SHOTS, printable
from experiments.report.shots import ExampleRecord, load_examples
from experiments.study.cells import unequal
from experiments.study.compare import BASELINE
from experiments.study.layout import differences, labels, parts
from experiments.study.record import SAMPLES, read_result
from experiments.study.rows import Row
from experiments.study.samples import RECALL, read_scores

LONGEST_QUESTION = 60


class DeckFacts:
    """The finished rows of a study, which must have one, and the three that most slides are about."""

    def __init__(self, study: Path, rows: Sequence[Row]) -> None:
        self.study = study
        self.rows = parts([row for row in rows if row["status"] == "ok"])[0][1]
        self.names = labels(self.rows)
        self.pooled = self._first(BASELINE)
        self.full = self._first("full")
        self.ours = our_row(self.rows)

    @property
    def summary(self) -> str:
        sets = ", ".join(sorted({row["dataset"] for row in self.rows}))
        counts = sorted({row["n"] for row in self.rows})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"study {self.study.name}; {sets}; n = {n}; 95 % intervals"

    def name(self, row: Row) -> str:
        return self.names[next(i for i, other in enumerate(self.rows) if other is row)]

    def result(self, row: Row) -> Mapping[str, Any]:
        result = read_result(self.study / row["job"])
        assert result is not None
        return result

    def shots(self, row: Row) -> dict[str, ExampleRecord]:
        """The samples that the row's job drew, by id."""
        return {shot.record["id"]: shot for shot in load_examples(self.study / row["job"] / SHOTS)}

    def against_baseline(self, row: Row) -> str:
        """The row's differences to the baseline, with intervals; empty where there is none."""
        parts = []
        for name in self._compared(BASELINE):
            if f"delta {name} mean" in row:
                mean, low, high = (100 * row[f"delta {name} {key}"] for key in ("mean", "low", "high"))
                group = name.removesuffix(f"vs {BASELINE}").strip() or "all"
                parts.append(f"{group} {signed(mean)} [{signed(low)}, {signed(high)}]")
        return "; ".join(parts)

    def extremes(self, against: str) -> list[str]:
        """The largest loss and the largest gain of a comparison."""
        found = [
            (100 * row[f"delta {name} mean"], name, self.name(row))
            for row in self.rows
            for name in self._compared(against)
            if f"delta {name} mean" in row
        ]
        ends = dict.fromkeys((min(found), max(found))) if found else ()
        return [f"{who}, {what}: {signed(size)} points." for size, what, who in ends]

    def detectable(self) -> float | None:
        """The largest of the differences that the study's comparisons would find with 80 % power, in points."""
        sizes = [
            100 * row[f"delta {name} detectable"]
            for row in self.rows
            for name in differences(self.rows)
            if f"delta {name} detectable" in row
        ]
        return max(sizes, default=None)

    def right(self, row: Row) -> dict[str, bool]:
        """Whether each sample was answered right."""
        scores = read_scores(self.study / row["job"] / SAMPLES, row["metric"])
        return {i: score.value >= RIGHT for i, score in scores.items()}

    def recall(self, row: Row) -> dict[str, float]:
        """Share of each sample's evidence that was kept, where it is known."""
        return {i: score.value for i, score in read_scores(self.study / row["job"] / SAMPLES, RECALL).items()}

    def said(self, ids: Sequence[str], row: Row, other: Row) -> list[list[str]]:
        """Question, expected answers, what the row said and what the other said."""
        columns = ["id", "question", "answers", "prediction"]
        ours, theirs = (
            {sample["id"]: sample for sample in pq.read_table(path / SAMPLES, columns=columns).to_pylist()}
            for path in (self.study / row["job"], self.study / other["job"])
        )
        return [
            [
                printable(ours[i]["question"], LONGEST_QUESTION),
                printable(" | ".join(ours[i]["answers"])),
                printable(ours[i]["prediction"]) or "(empty)",
                printable(theirs[i]["prediction"]) or "(empty)",
            ]
            for i in ids
        ]

    def missing(self, what: str, sense: str) -> str:
        return f"Not in this study: {sense}. python eval.py study={self.study.name} {what} adds it."

    def _compared(self, against: str) -> list[str]:
        return [name for name in differences(self.rows) if name.rpartition("vs ")[2] == against]

    def _first(self, selector: str) -> Row | None:
        return next((row for row in self.rows if row["selector"] == selector), None)


def our_row(rows: Sequence[Row]) -> Row | None:
    """The whole method with the highest score, at an equal budget where there is one."""
    family = [row for row in rows if row["status"] == "ok" and row["selector"].startswith("shirg")]
    whole = [row for row in family if row.get("ablation") in (None, "none")]
    return max(whole, key=lambda row: (not unequal(row), row.get(f"{row['metric']} mean") or 0.0), default=None)


def signed(points: float) -> str:
    """With a true minus sign, which no line breaks after."""
    return f"{points:+.1f}".replace("-", "\u2212")
