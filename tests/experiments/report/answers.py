"""Right and wrong answers of a study, counted straight from its files: what page and slides must show."""

from pathlib import Path

from experiments.analysis.table import collect
from experiments.jobs.sample_rows import read_rows


def answered(study: Path) -> dict[str, dict[str, bool]]:
    """Which samples each system answered right, straight from its file."""
    rows = {row["job"]: row for row in collect(study) if row["status"] == "ok"}
    return {
        f"{row['selector']} {row['budget']} {row['ablation']}": {
            sample["id"]: sample["scores"]["exact_match"] >= 0.5
            for sample in read_rows(study / job / "samples.parquet")
        }
        for job, row in rows.items()
    }


def counts(answers: dict[str, dict[str, bool]], first: str, second: str) -> dict[str, int]:
    names = {"pooled": "pooled  none", "shirg": "shirg base (80) none"}
    pairs = [(right, answers[names[second]][i]) for i, right in answers[names[first]].items()]
    return {
        "all": len(pairs),
        "wrong": sum(not b for _, b in pairs),
        "fixed": sum(b and not a for a, b in pairs),
        "broken": sum(a and not b for a, b in pairs),
        "both right": sum(a and b for a, b in pairs),
        "both wrong": sum(not a and not b for a, b in pairs),
    }
