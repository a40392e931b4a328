"""What the slides state about a study: its finished rows, and what only the files of its jobs say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.analysis.columns import differences
from experiments.analysis.paired import BASELINE, other_name
from experiments.analysis.rows import Row, our_row
from experiments.analysis.stats import Estimate, estimate
from experiments.analysis.system_names import labels
from experiments.analysis.table import parts
from experiments.jobs.results import SAMPLES, SHOTS, read_result
from experiments.jobs.sample_rows import Score, read_scores
from experiments.report.verdict import heading, origin
from experiments.viz.examples import ExampleRecord, load_examples, printable

LONGEST_NAME = 60
"""Letters of a system's name on a slide."""
_ANSWER = ["id", "question", "answers", "prediction", "subtask"]


class StudyFacts:
    """The finished rows of a study, at least one, and what the slides state about them.

    Most slides are about three of them: the baseline, the one with all tokens, and the best row of our method.
    """

    def __init__(self, study: Path, rows: Sequence[Row]) -> None:
        self.study = study
        self.rows = parts([row for row in rows if row["status"] == "ok"])[0][1]
        self.names = [printable(name, LONGEST_NAME) for name in labels(self.rows)]
        self.pooled = self._first(BASELINE)
        self.full = self._first("full")
        self.ours = our_row(self.rows)

    @property
    def summary(self) -> str:
        return f"study {self.study.name}; {self.datasets}; n = {self.size}; [ ]: 95 % intervals"

    @property
    def datasets(self) -> str:
        return ", ".join(sorted({row["dataset"] for row in self.rows}))

    @property
    def size(self) -> str:
        counts = sorted({row["n"] for row in self.rows})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    def identity(self) -> list[str]:
        """Models and data, systems and machine, date and commit: a line for each."""
        results = [self.result(row) for row in self.rows]
        machines = sorted({f"{row['env device']}, {row['env dtype']}" for row in self.rows})
        number = f"{len(self.rows)} system{'' if len(self.rows) == 1 else 's'}"
        return [heading(results), f"{number} on {'; '.join(machines)}", origin(results)]

    def name(self, row: Row) -> str:
        return self.names[next(i for i, other in enumerate(self.rows) if other is row)]

    def result(self, row: Row) -> Mapping[str, Any]:
        result = read_result(self.study / row["job"])
        assert result is not None
        return result

    def examples(self, row: Row) -> dict[str, ExampleRecord]:
        """The samples that the row's job drew, by id."""
        return {one.record["id"]: one for one in load_examples(self.study / row["job"] / SHOTS)}

    def against_baseline(self, row: Row) -> str:
        """The row's differences to the baseline, with intervals; empty where there is none."""
        found = []
        for name in self._compared(BASELINE):
            if row.get(f"delta {name} mean") is not None:
                group = name.removesuffix(f"vs {BASELINE}").strip() or "all"
                found.append(f"{group} {difference(row, name)}")
        return "; ".join(found)

    def extremes(self, against: str) -> list[str]:
        """The largest loss and the largest gain of a comparison, with intervals."""
        found = [
            (row[f"delta {name} mean"], f"{self.name(row)}, {name}: {difference(row, name)} points.")
            for row in self.rows
            for name in self._compared(against)
            if row.get(f"delta {name} mean") is not None
        ]
        return list(dict.fromkeys(text for _, text in (min(found), max(found)))) if found else []

    def detectable(self) -> float | None:
        """The largest of the differences that the study's comparisons would find with 80 % power, in points."""
        sizes = [
            100 * row[f"delta {name} detectable"]
            for row in self.rows
            for name in differences(self.rows)
            if row.get(f"delta {name} detectable") is not None
        ]
        return max(sizes, default=None)

    def scores(self, row: Row, metric: str) -> dict[str, Score]:
        """Scores by sample id; `metric` may also be "recall"."""
        return read_scores(self.study / row["job"] / SAMPLES, metric)

    def answers(self, row: Row) -> dict[str, dict[str, Any]]:
        """Question, kind of question, expected answers and the row's answer by sample id."""
        table = pq.read_table(self.study / row["job"] / SAMPLES, columns=_ANSWER)
        return {sample["id"]: sample for sample in table.to_pylist()}

    def _compared(self, against: str) -> list[str]:
        return [name for name in differences(self.rows) if other_name(name) == against]

    def _first(self, selector: str) -> Row | None:
        return next((row for row in self.rows if row["selector"] == selector), None)


def difference(row: Row, name: str) -> str:
    """A paired difference in points with its interval."""
    mean, low, high = (100 * row[f"delta {name} {key}"] for key in ("mean", "low", "high"))
    return f"{signed(mean)} [{signed(low)}, {signed(high)}]"


def share(values: Mapping[str, float], scores: Mapping[str, Score]) -> str:
    """The mean of values of samples in % with its interval, for which pictures are resampled."""
    found: Estimate = estimate(list(values.values()), [scores[i].picture for i in values])
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def signed(points: float) -> str:
    """With a minus sign instead of a hyphen, so that no line breaks after it."""
    return f"{points:+.1f}".replace("-", "\u2212")
