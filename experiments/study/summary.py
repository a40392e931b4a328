"""From rows of samples to the sections `quality` and `tokens` of result.json."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments.study.stats import estimate

Row = dict[str, Any]


def summarise(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Every metric over all rows, the headline metric over subsets, recall, and token counts."""
    headline = metrics[0]
    return {
        "quality": {
            "metric": headline,
            "metrics": {name: _score(rows, name) for name in metrics},
            "subsets": {key: _score(part, headline) for key, part in partition(rows, subset).items()},
            "subtasks": {key: _score(part, headline) for key, part in partition(rows, lambda r: r["subtask"]).items()},
            "recall": _mean_recall(rows),
            "recall_subsets": {key: _mean_recall(part) for key, part in partition(rows, subset).items()},
        },
        "tokens": {
            "visual": _spread([row["n_visual"] for row in rows]),
            "prefix": _spread([row["n_prefix"] for row in rows]),
            "cache": _spread([row["n_cache"] for row in rows]) if rows[0]["n_cache"] is not None else None,
            "by_source": {s: sum(row["sources"][s] for row in rows) / len(rows) for s in rows[0]["sources"]},
        },
    }


def subset(row: Row) -> str:
    """The column of the table that a sample counts in, "" when its dataset names no groups."""
    return " ".join(part for part in (row["group"], row["density"]) if part)


def partition(rows: Sequence[Row], key: Any) -> dict[str, list[Row]]:
    """Rows by key, in the order in which the data brings groups and densities; rows with an empty key are left out."""
    groups, densities = (list(dict.fromkeys(row[name] for row in rows)) for name in ("group", "density"))
    parts: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (groups.index(row["group"]), densities.index(row["density"]))):
        if name := key(row):
            parts.setdefault(name, []).append(row)
    return parts


def _score(rows: Sequence[Row], metric: str) -> dict[str, float] | None:
    scored = [(row["scores"][metric], row["picture"]) for row in rows if row["scores"][metric] is not None]
    return asdict(estimate(*zip(*scored, strict=True))) if scored else None


def _mean_recall(rows: Sequence[Row]) -> dict[str, float] | None:
    known = [(row["recall"], row["picture"]) for row in rows if row["recall"] is not None]
    return asdict(estimate(*zip(*known, strict=True))) if known else None


def _spread(counts: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}
