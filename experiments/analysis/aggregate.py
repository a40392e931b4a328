"""Aggregation: the columns of samples.parquet to the sections of result.json, and scores that depend on all answers.

Rows are read in blocks and columns one at a time: neither the rows nor their texts are in memory together.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.analysis.position_bias import probe
from experiments.analysis.stats import estimate
from experiments.jobs.sample_rows import RECALL, SPREADS, SampleColumns, subset_name
from experiments.metrics.answers import Scorer, score_together
from experiments.metrics.concentration import gini

Score = dict[str, float]


def summarise(rows: SampleColumns, metrics: Sequence[str], corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every metric over all rows, the headline metric over subsets, recall, token counts, steps and the prefix cache;
    how what is kept is spread over the pictures.

    `drift` is the largest |difference| of a logit that a smaller cache makes, `same_top1` the share of answer slots
    whose likeliest token stays the same.

    Args:
        corpora: the facts of metrics that depend on all rows.
    """
    tops = {name: facts.get("top", 1.0) for name, facts in corpora.items()}
    headline, pictures_N = metrics[0], rows.pictures()
    groups, subsets, subtasks = partitions(rows)
    quality, recall = _Means(rows, f"score_{headline}", pictures_N), _Means(rows, RECALL, pictures_N)
    in_cache, final = rows.known("n_cache"), rows.known("has_final")
    return {
        "quality": {
            "metric": headline,
            "metrics": {
                name: _Means(rows, f"score_{name}", pictures_N, tops.get(name, 1.0)).over() for name in metrics
            },
            "groups": {key: quality.over(part_M) for key, part_M in groups.items()},
            "subsets": {key: quality.over(part_M) for key, part_M in subsets.items()},
            "subtasks": {key: quality.over(part_M) for key, part_M in subtasks.items()},
            "corpora": {name: facts for name, facts in corpora.items() if facts},
            "probe": probe(_placed(rows, headline), headline),
            "recall": recall.over(),
            "recall_subsets": {key: recall.over(part_M) for key, part_M in subsets.items()},
        },
        "tokens": {
            "visual": _count_spread(rows.known("n_visual")),
            "prefix": _count_spread(rows.known("n_prefix")),
            "cache": _count_spread(in_cache) if len(in_cache) else None,
            "by_source": {source: int(rows.known(f"n_{source}").sum()) / len(rows) for source in rows.sources},
        },
        "decoding": {
            "steps": _count_spread(rows.known("n_steps")),
            "cache_bytes": _mean(rows.known("cache_bytes")),
            "drift": max(map(float, rows.known("drift")), default=None),
            "same_top1": _mean(rows.known("same_top1")),
            # How many texts had no answer where `data.answer_rule` looks; None for a rule that always finds one.
            "without_final_answer": int((~final).sum()) if len(final) else None,
        },
        "selection": {
            **{name: _Means(rows, name, pictures_N).over() for name in SPREADS},
            "position_gini": position_gini(table["kept_map"] for table in rows.tables(["kept_map"])),
        },
    }


class _Means:
    """The means of a column over parts of the rows.

    Args:
        top: the largest score; intervals are made for scores in [0, 1].
    """

    def __init__(self, rows: SampleColumns, column: str, pictures_N: np.ndarray, top: float = 1.0) -> None:
        self.known_N, self.score_N = rows.is_known(column), rows.numbers(column) / top
        self.pictures_N, self.top = pictures_N, top

    def over(self, part_M: np.ndarray | None = None) -> Score | None:
        """The mean in the metric's own unit over the rows whose numbers are given; None where none has a value."""
        known_M = np.flatnonzero(self.known_N) if part_M is None else part_M[self.known_N[part_M]]
        if not len(known_M):
            return None
        found = asdict(estimate(self.score_N[known_M], self.pictures_N[known_M]))
        return {key: value if key == "n" else value * self.top for key, value in found.items()}


def position_gini(maps: Iterable[pa.ChunkedArray]) -> float | None:
    """The Gini coefficient of how often the tokens of each field of the picture are kept, over all selections.

    0 where every field is kept equally often, whatever single pictures look like; None without a kept token.

    Args:
        maps: for each selection the share that is kept of each field; null for a field without a token, or for all.
    """
    total: np.ndarray | float = 0.0
    count: np.ndarray | int = 0
    for block in maps:
        if len(known := block.drop_null()):
            share_MF = np.asarray(known.combine_chunks().flatten()).reshape(len(known), -1)
            total, count = total + np.nansum(share_MF, axis=0), count + (~np.isnan(share_MF)).sum(axis=0)
    there = np.atleast_1d(count) > 0
    return gini(np.atleast_1d(total)[there] / np.atleast_1d(count)[there]) if there.any() else None


def partitions(rows: SampleColumns) -> tuple[dict[str, np.ndarray], ...]:
    """The numbers of the rows of each group, of each subset (group and density) and of each subtask; those with an
    empty name are left out. Parts and rows are in the order in which the data brings groups and densities.
    """
    (group_N, groups), (density_N, densities) = rows.coded("group"), rows.coded("density")
    subtask_N, subtasks = rows.coded("subtask")
    order_N = np.lexsort((density_N, group_N))
    names = [subset_name(group, density) for group in groups for density in densities]
    return (
        _parts(group_N, groups, order_N),
        _parts(group_N * len(densities) + density_N, names, order_N),
        _parts(subtask_N, subtasks, order_N),
    )


def _parts(code_N: np.ndarray, names: Sequence[str], order_N: np.ndarray) -> dict[str, np.ndarray]:
    codes, first, member_N, counts = np.unique(
        code_N[order_N], return_index=True, return_inverse=True, return_counts=True
    )
    members = np.split(order_N[np.argsort(member_N, kind="stable")], np.cumsum(counts)[:-1])
    parts: dict[str, list[np.ndarray]] = {}
    for i in np.argsort(first):
        if name := names[codes[i]]:
            parts.setdefault(name, []).append(members[i])
    return {name: np.concatenate(found) for name, found in parts.items()}


def _placed(rows: SampleColumns, metric: str) -> Iterator[Mapping[str, Any]]:
    """The rows of questions about places (EntityGrid), as far as the probe of position bias needs them."""
    if any(rows.coded("place")[1]):
        score = f"score_{metric}"
        for block in rows.tables(("place", "subtask", "entity", RECALL, "prediction", "answers", score)):
            for row in block.to_pylist():
                yield {**row, "scores": {metric: row[score]}}


def _mean(values: np.ndarray) -> float | None:
    return sum(map(float, values)) / len(values) if len(values) else None


def _count_spread(counts: np.ndarray) -> Score:
    return {"mean": int(counts.sum(dtype=np.int64)) / len(counts), "min": int(counts.min()), "max": int(counts.max())}


@dataclass(frozen=True)
class _Column:
    """One column of tables that can be read again."""

    tables: Iterable[pa.Table]
    name: str

    def __iter__(self) -> Iterator[Any]:
        for table in self.tables:
            yield from table[self.name].to_pylist()


@dataclass(frozen=True)
class ScoredTables:
    """The rows of tables with the scores that depend on all of them, as often as they are asked for."""

    tables: Iterable[pa.Table]
    scores: Mapping[str, np.ndarray]
    """By metric; NaN for a sample without one."""

    def __iter__(self) -> Iterator[pa.Table]:
        begin = 0
        for table in self.tables:
            end = begin + len(table)
            for name, score_N in self.scores.items():
                column = pa.array(score_N[begin:end], pa.float64(), from_pandas=True)
                table = table.set_column(table.column_names.index(f"score_{name}"), f"score_{name}", column)
            yield table
            begin = end


def score_corpora(
    tables: Iterable[pa.Table], scorers: Mapping[str, Scorer]
) -> tuple[Iterable[pa.Table], dict[str, dict[str, Any]]]:
    """The tables with the scores of metrics that depend on all rows, and the facts of each such metric."""
    scores, facts = score_together(_Column(tables, "prediction"), _Column(tables, "answers"), scorers)
    return (ScoredTables(tables, scores) if scores else tables), facts
