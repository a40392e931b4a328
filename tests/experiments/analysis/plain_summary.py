"""The summary of a job, plainly: all rows in a list, one pass over it for each number."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from experiments.analysis.position_bias import probe
from experiments.analysis.stats import estimate
from experiments.jobs.sample_rows import SPREADS, SampleRow, SpreadName, picture_of_row, subset_name
from experiments.metrics.answers import score_together, text_metrics
from experiments.metrics.concentration import gini


def summarise(rows: Sequence[SampleRow], metrics: Sequence[str]) -> dict[str, Any]:
    """Every metric over all rows, the headline metric over subsets, recall, token counts, steps and the prefix cache;
    how what is kept is spread over the pictures.

    Scores that depend on all rows are put into the rows.
    """
    texts = [row["prediction"] for row in rows], [row["answers"] for row in rows]
    scores, corpora = score_together(*texts, text_metrics(metrics))
    for name, values in scores.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row["scores"][name] = None if math.isnan(value) else value
    tops = {name: facts.get("top", 1.0) for name, facts in corpora.items()}
    headline = metrics[0]
    in_cache = [row["n_cache"] for row in rows if row["n_cache"] is not None]
    return {
        "quality": {
            "metric": headline,
            "metrics": {name: _score(rows, name, tops.get(name, 1.0)) for name in metrics},
            "groups": {key: _score(part, headline) for key, part in partition(rows, lambda r: r["group"]).items()},
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
            "cache": _count_spread(in_cache) if in_cache else None,
            "by_source": {s: sum(row["sources"][s] for row in rows) / len(rows) for s in rows[0]["sources"]},
        },
        "decoding": {
            "steps": _count_spread([row["n_steps"] for row in rows]),
            "cache_bytes": _mean([row["cache_bytes"] for row in rows]),
            "drift": max((row["drift"] for row in rows if row["drift"] is not None), default=None),
            "same_top1": _mean([row["same_top1"] for row in rows]),
            "without_final_answer": _without_final(rows),
        },
        "selection": {
            **{name: _mean_spread(rows, name) for name in SPREADS},
            "position_gini": position_gini([found for row in rows if (found := row.get("kept_map"))]),
        },
    }


def _without_final(rows: Sequence[SampleRow]) -> int | None:
    """How many texts had no answer where `data.answer_rule` looks; None for a rule that always finds one."""
    found = [has for row in rows if (has := row.get("has_final")) is not None]
    return found.count(False) if found else None


def position_gini(maps: Sequence[Sequence[float | None]]) -> float | None:
    """The Gini coefficient of how often the tokens of each field of the picture are kept, over all selections.

    0 where every field is kept equally often, whatever single pictures look like; None without a kept token.

    Args:
        maps: for each selection the share that is kept of each field; None for a field without a token.
    """
    if not maps:
        return None
    known = [[share for share in field if share is not None] for field in zip(*maps, strict=True)]
    return gini([fmean(shares) for shares in known if shares])


def subset(row: SampleRow) -> str:
    """The subset that a sample belongs to, "" when its dataset names no groups."""
    return subset_name(row["group"], row["density"])


def partition(rows: Sequence[SampleRow], key: Callable[[SampleRow], str]) -> dict[str, list[SampleRow]]:
    """Rows by key, in the order in which the data brings groups and densities; rows with an empty key are left out."""
    groups, densities = list(dict.fromkeys(r["group"] for r in rows)), list(dict.fromkeys(r["density"] for r in rows))
    parts: dict[str, list[SampleRow]] = {}
    for row in sorted(rows, key=lambda row: (groups.index(row["group"]), densities.index(row["density"]))):
        if name := key(row):
            parts.setdefault(name, []).append(row)
    return parts


def _score(rows: Sequence[SampleRow], metric: str, top: float = 1.0) -> dict[str, float] | None:
    """The mean in the metric's own unit; intervals are made for scores in [0, 1]."""
    scored = [(score / top, picture_of_row(row)) for row in rows if (score := row["scores"][metric]) is not None]
    if not scored:
        return None
    found = asdict(estimate(*zip(*scored, strict=True)))
    return {key: value if key == "n" else value * top for key, value in found.items()}


def _mean_recall(rows: Sequence[SampleRow]) -> dict[str, float] | None:
    known = [(row["recall"], picture_of_row(row)) for row in rows if row["recall"] is not None]
    return asdict(estimate(*zip(*known, strict=True))) if known else None


def _mean_spread(rows: Sequence[SampleRow], name: SpreadName) -> dict[str, float] | None:
    known = [(value, picture_of_row(row)) for row in rows if (value := row.get(name)) is not None]
    return asdict(estimate(*zip(*known, strict=True))) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _count_spread(counts: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}
