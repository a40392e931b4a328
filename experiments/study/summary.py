"""From rows of samples to the sections `quality`, `tokens` and `decoding` of result.json."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments.scoring import score_together, text_metrics
from experiments.study.probe import probe
from experiments.study.samples import subset_name
from experiments.study.stats import estimate

Row = dict[str, Any]


def summarise(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Every metric over all rows, the headline metric over subsets, recall, token counts, steps and the prefix cache.

    Metrics that depend on all rows are computed here, and their scores put into the rows. `drift` is the largest
    |difference| of a logit that a smaller cache makes, `same_top1` the share of answer slots whose likeliest token
    stays the same.
    """
    corpora = score_together(rows, text_metrics(metrics))
    tops = {name: facts.get("top", 1.0) for name, facts in corpora.items()}
    headline = metrics[0]
    return {
        "quality": {
            "metric": headline,
            "metrics": {name: _score(rows, name, tops.get(name, 1.0)) for name in metrics},
            "subsets": {key: _score(part, headline) for key, part in partition(rows, subset).items()},
            "subtasks": {key: _score(part, headline) for key, part in partition(rows, lambda r: r["subtask"]).items()},
            "corpora": {name: facts for name, facts in corpora.items() if facts},
            "probe": probe(rows, headline),
            "recall": _mean_recall(rows),
            "recall_subsets": {key: _mean_recall(part) for key, part in partition(rows, subset).items()},
        },
        "tokens": {
            "visual": _count_spread([row["n_visual"] for row in rows]),
            "prefix": _count_spread([row["n_prefix"] for row in rows]),
            "cache": _count_spread([row["n_cache"] for row in rows]) if rows[0]["n_cache"] is not None else None,
            "by_source": {s: sum(row["sources"][s] for row in rows) / len(rows) for s in rows[0]["sources"]},
        },
        "decoding": {
            "steps": _count_spread([row["n_steps"] for row in rows]),
            "cache_bytes": _mean([row["cache_bytes"] for row in rows]),
            "drift": max((row["drift"] for row in rows if row["drift"] is not None), default=None),
            "same_top1": _mean([row["same_top1"] for row in rows]),
        },
    }


def subset(row: Row) -> str:
    """The column of the table that a sample counts in, "" when its dataset names no groups."""
    return subset_name(row["group"], row["density"])


def partition(rows: Sequence[Row], key: Any) -> dict[str, list[Row]]:
    """Rows by key, in the order in which the data brings groups and densities; rows with an empty key are left out."""
    groups, densities = (list(dict.fromkeys(row[name] for row in rows)) for name in ("group", "density"))
    parts: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (groups.index(row["group"]), densities.index(row["density"]))):
        if name := key(row):
            parts.setdefault(name, []).append(row)
    return parts


def _score(rows: Sequence[Row], metric: str, top: float = 1.0) -> dict[str, float] | None:
    """The mean in the metric's own unit; intervals are made for scores in [0, 1]."""
    scored = [(row["scores"][metric] / top, row["picture"]) for row in rows if row["scores"][metric] is not None]
    if not scored:
        return None
    found = asdict(estimate(*zip(*scored, strict=True)))
    return {key: value if key == "n" else value * top for key, value in found.items()}


def _mean_recall(rows: Sequence[Row]) -> dict[str, float] | None:
    known = [(row["recall"], row["picture"]) for row in rows if row["recall"] is not None]
    return asdict(estimate(*zip(*known, strict=True))) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _count_spread(counts: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}
